"""A run's folder: result, checkpoints, resuming, signals, trust, whole files, console."""
