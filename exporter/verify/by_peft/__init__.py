"""Compute the expected values of modules for which only PEFT can compute the adapter's change."""
