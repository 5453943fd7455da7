"""Inputs of a training run: the base, the data and the vocabulary."""
