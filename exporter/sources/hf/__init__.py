"""Hugging Face checkpoints and the hub."""
