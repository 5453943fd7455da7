"""Weights of a graph: precisions, blocks of quantised values, external data."""
