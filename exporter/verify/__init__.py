"""Verify that an artifact on disk equals the tuned model. Imports no code that writes artifacts."""
