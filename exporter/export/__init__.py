"""A single export: read, plan, stage, verify, publish."""
