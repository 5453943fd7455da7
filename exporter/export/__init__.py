"""One export: read, plan, stage, verify, publish."""
