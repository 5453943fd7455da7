"""Reads adapters in PEFT's format."""
