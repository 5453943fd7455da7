"""A training run, from the TuneSpec to the adapter folder."""
