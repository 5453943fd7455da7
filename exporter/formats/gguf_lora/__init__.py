"""GGUF LoRA files for ``llama-cli --lora``, which contain the adapter without the base."""
