"""Merges adapters into a checkpoint: plans the merge, applies passes to tensors, and checks that no tensor is lost."""
