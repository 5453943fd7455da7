"""Handles the consequences of new tokens: auxiliary files, special ids, and rows of whole matrices."""
