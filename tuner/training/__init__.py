"""Run a training, from the TuneSpec to the adapter folder."""
