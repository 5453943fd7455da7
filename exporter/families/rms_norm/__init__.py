"""Decoders with RMS norms, like Llama."""
