"""Inputs of a training run: base, data, vocabulary."""
