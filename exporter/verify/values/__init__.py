"""Compare stored rows of an artifact with the expected rows of the tuned model."""
