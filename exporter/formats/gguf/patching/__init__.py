"""Patching a GGUF of any architecture: rows of token_embd.weight and output.weight, and the tokens they belong to."""
