"""Reads Hugging Face checkpoints and their tokenizers."""
