"""The matrices of an artifact on disk."""
