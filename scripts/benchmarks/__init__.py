"""One benchmark a module; `scripts/benchmark.py` runs them."""
