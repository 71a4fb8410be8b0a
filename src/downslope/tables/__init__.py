"""Tables of numbers: read, split, standardised, and served in batches from memory."""
