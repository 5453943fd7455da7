"""Merges adapters that only PEFT can merge, by running PEFT, if the user sets ``--via peft``."""
