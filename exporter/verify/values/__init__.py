"""Compare the rows stored in an artifact with the rows of the tuned model."""
