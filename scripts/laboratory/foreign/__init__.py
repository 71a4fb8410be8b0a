"""Code as other people write it, for `peers.py`: their modules, optimizers and Trainer options."""
