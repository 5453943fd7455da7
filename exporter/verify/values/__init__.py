"""Comparison of stored rows with the trained rows."""
