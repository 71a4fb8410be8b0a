"""Sweeps: which jobs are missing, each run once and as if alone, and what came of them."""
