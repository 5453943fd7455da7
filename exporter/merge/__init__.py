"""Merges adapters and a checkpoint into a ``MergedModel``: passes, the plan, the coverage ledger."""
