"""Determine what llama.cpp will do with the tokens of a GGUF, before the GGUF is written."""
