"""What patching has in common whatever the format of the base: an adapter's rows, and a journal for work in place."""
