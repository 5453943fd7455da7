"""A training run, from its TuneSpec to the adapter folder."""
