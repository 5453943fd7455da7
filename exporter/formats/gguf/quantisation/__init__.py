"""Quantise GGUF files and tensors to exactly the values that llama.cpp's quantiser produces."""
