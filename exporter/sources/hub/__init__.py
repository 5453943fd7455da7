"""The Hugging Face hub: its cache, downloads, and what a user names by path or id."""
