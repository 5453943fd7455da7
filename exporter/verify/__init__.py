"""Verify that an artifact on disk equals the tuned model.

The package imports none of the code that writes artifacts, so that the verification does not repeat a writer's errors.
"""
