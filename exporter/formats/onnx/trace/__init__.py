"""Graphs of models without a description, traced by torch."""
