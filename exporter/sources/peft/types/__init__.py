"""Lists the adapter types (other than LoRA and token rows) that PEFT can merge, and groups their tensors by module."""
