"""Quantised GGUF files and tensors, with the values that llama.cpp's quantiser gives."""
