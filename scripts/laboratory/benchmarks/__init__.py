"""One benchmark a module; `scripts/laboratory/benchmark.py` runs them."""
