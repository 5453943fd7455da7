"""Adapter types other than token rows and LoRA: which types PEFT can merge, and the tensors of their adapters."""
