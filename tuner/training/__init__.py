"""Train token rows as a TuneSpec specifies, and write the adapter folder."""
