"""Check Hugging Face checkpoint folders, and the auxiliary files of any folder with a model."""
