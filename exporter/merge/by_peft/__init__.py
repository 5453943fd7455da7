"""Merges adapters that only PEFT can merge, if the user asks for it."""
