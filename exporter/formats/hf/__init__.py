"""Write Hugging Face checkpoints."""
