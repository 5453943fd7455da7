"""Packages for the output formats, each of which writes a ``MergedModel`` in one format."""
