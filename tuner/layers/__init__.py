"""Implements a PEFT tuner that trains the embedding rows of selected tokens."""
