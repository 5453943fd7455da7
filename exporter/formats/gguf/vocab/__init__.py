"""The tokenizer as GGUF metadata: tokens, splitting, special ids, templates."""
