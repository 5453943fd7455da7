"""Verify that an artifact on disk equals the tuned model. The package imports no code that writes artifacts."""
