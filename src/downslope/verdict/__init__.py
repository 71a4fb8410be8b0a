"""How a run does: evidence, judgement, suggestion. Torch alone."""
