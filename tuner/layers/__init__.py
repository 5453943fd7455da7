"""Implements a PEFT tuner for token rows, whose layers contain the trained rows."""
