"""The documents of a release: manifest, checksums, provenance, card, signature."""
