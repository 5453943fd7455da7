"""Adapters and a checkpoint in, a ``MergedModel`` out: passes, the plan, the coverage ledger."""
