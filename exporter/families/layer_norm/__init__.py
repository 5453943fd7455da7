"""Decoders with layer norms (mean and variance), like GPT-2."""
