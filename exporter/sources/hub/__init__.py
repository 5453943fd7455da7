"""The Hugging Face hub: its cache, downloads, and inputs given by path or id."""
