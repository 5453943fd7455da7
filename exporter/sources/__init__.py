"""Reads containers, checkpoints and adapters. Headers are read on opening, tensor bytes on demand."""
