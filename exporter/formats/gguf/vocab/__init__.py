"""The tokenizer as GGUF metadata: tokens, pre-tokenizer, special ids, templates."""
