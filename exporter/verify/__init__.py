"""Proof that an artifact on disk equals the tuned model. Imports nothing that made the artifact."""
