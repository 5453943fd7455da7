"""Checks that a patch changed only the trained rows."""
