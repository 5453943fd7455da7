"""Handles new tokens: chooses tokenizer files, updates special token ids, and counts the rows of the embedding."""
