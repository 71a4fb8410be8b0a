"""What your_task is about, in a line."""
