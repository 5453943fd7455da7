"""Convert a tokenizer to GGUF metadata: tokens, pre-tokenizer, special token ids and chat templates."""
