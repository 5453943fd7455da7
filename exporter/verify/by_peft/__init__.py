"""Compute the expected weights of modules whose adapter type only PEFT's own layers can apply."""
