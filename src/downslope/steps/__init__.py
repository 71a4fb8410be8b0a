"""Where a step can be read, and its loss had again without a trace."""
