"""How llama.cpp reads the texts of a tokenizer's tokens, as opposed to transformers."""
