"""Reads and writes files safely: opens only regular files, streams output, and renames finished files atomically."""
