"""Handles new tokens in a merge: chooses tokenizer files, updates special token ids, and resizes the embedding."""
