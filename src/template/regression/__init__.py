"""A line y = Wx + b under a mean squared error: the model, the cycle written out, the data."""
