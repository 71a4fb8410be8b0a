"""Pictures: figures out of tensors, drawn without a display; matplotlib is imported when the first is drawn."""
