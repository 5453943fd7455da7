"""Write GGUF LoRA files, which contain an adapter without its base, and which ``llama-cli --lora`` loads."""
