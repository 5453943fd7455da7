"""Quantised GGUF files and tensors, as llama.cpp makes them."""
