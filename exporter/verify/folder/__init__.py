"""Check Hugging Face checkpoint folders, and the auxiliary files, such as tokenizers, in any model folder."""
