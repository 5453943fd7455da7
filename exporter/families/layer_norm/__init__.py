"""Decoders with layer norms, which normalise mean and variance, like GPT-2."""
