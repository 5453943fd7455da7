"""Finds inputs by path or by id on the Hugging Face hub, in the hub's cache or by download."""
