"""Verify that an artifact on disk equals the tuned model.

The package does not import the code that writes artifacts, because shared code would hide a writer's errors from the
verification.
"""
