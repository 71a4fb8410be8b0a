"""Pure maths over tensors: neither Lightning nor Hydra is imported here."""
