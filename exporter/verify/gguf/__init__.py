"""Check GGUF files against the base checkpoint and the adapters."""
