"""Sweeps: what their jobs were, as a table, as pictures and as a page. Nothing here needs torch."""
