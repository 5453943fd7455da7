"""Write GGUF LoRA files, which contain an adapter without its base model.

llama.cpp loads a GGUF LoRA with the option ``--lora``.
"""
