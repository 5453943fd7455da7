"""Runs the unmodified PEFT library on single modules of a base, for adapters that only PEFT can merge.

Both the merge and the verification load a module's weight from the base and inject the adapter with PEFT. The merge
then calls PEFT's merge method; the verification calls PEFT's forward pass with the unmerged adapter.
"""
