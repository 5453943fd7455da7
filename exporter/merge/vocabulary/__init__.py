"""What follows from new tokens: files, ids, rows of the whole matrix."""
