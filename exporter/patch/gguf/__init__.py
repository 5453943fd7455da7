"""Rows into an existing GGUF file."""
