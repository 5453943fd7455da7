"""Patches rows in an existing GGUF file."""
