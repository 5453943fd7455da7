"""Verify that an artifact on disk equals the tuned model.

The package ``exporter.verify`` does not import the code that writes artifacts, because shared code would hide the
writer's errors from the verification.
"""
