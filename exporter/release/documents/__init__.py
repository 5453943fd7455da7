"""Render the documents of a release: manifest, checksums, provenance statement, model card, and signature."""
