"""Decoders that normalise by mean and variance, as GPT-2 does."""
