"""Checks of patched artifacts: nothing but the rows differs."""
