"""Runs stock PEFT on single modules of a base, for adapters that only PEFT can merge.

Merge and verification share the base's weights and the injection of the adapter. The merge then calls PEFT's merge, and
the verification calls PEFT's forward pass without a merge.
"""
