"""A training run, from its specification to the adapter folder."""
