"""Finds inputs given as a path or as a Hugging Face hub id, and downloads repositories that are not cached."""
