"""Gradient descent under a magnifying glass: what every gradient does, and what the learning rate does with it.

Nothing is imported here: `import downslope` costs nothing, and each part brings only what it needs.
"""
