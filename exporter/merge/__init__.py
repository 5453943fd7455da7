"""Merges adapters and a checkpoint into a ``MergedModel``, by a plan, passes, and the coverage ledger."""
