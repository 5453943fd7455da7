"""Handles new tokens: chooses tokenizer files, updates special token ids, and determines the size of the embedding."""
