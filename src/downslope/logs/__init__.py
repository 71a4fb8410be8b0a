"""What is measured, written where a dashboard finds it."""
