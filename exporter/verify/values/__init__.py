"""Stored rows against the rows that were trained."""
