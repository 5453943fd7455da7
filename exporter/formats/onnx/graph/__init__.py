"""The graph of a described decoder, built node by node."""
