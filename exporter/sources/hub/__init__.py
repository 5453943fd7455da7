"""Finds inputs given as a local path or as a repository id on the Hugging Face hub, and downloads missing repositories."""
