"""Reading: containers, checkpoints, adapters. Headers first, bytes when asked."""
