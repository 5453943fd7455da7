"""Consequences of new tokens: auxiliary files, special ids, rows of the whole matrix."""
