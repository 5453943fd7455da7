"""Merges adapters into a checkpoint: plans the merge, transforms the tensors, and checks that no tensor is lost."""
