"""Convert a tokenizer to GGUF metadata: tokens, pre-tokenizer, ids of special tokens, chat templates."""
