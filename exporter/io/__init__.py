"""Reads and writes files: safe opening, streamed output, atomic renames."""
