"""Reads adapters that are stored in PEFT's format."""
