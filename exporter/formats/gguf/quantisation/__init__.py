"""Quantised GGUF files and tensors, with values identical to the output of llama.cpp's quantiser."""
