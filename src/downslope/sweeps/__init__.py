"""Sweeps: which jobs are missing, each run once and as if alone, and how the whole ended."""
