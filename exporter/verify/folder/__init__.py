"""Checks of checkpoint folders and auxiliary files."""
