"""Writes an adapter's token rows into an existing GGUF file."""
