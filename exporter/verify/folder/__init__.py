"""Check Hugging Face checkpoint folders, and check the auxiliary files, such as tokenizers, in model folders."""
