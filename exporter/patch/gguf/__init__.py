"""Writes an adapter's trained embedding rows into an existing GGUF file."""
