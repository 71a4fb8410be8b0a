"""Handwritten digits: a small network tells which of ten an image shows."""
