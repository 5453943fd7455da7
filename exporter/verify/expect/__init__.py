"""Compute the expected content of an artifact from the base checkpoint and the adapters."""
