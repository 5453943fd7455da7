"""Read the embedding and head matrices of an artifact on disk."""
