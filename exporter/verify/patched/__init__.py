"""Checks of patched artifacts: only the rows differ."""
