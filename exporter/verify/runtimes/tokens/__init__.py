"""Tokenise texts with the vocabulary of a GGUF in llama.cpp and with the tuned model's tokenizer in transformers."""
