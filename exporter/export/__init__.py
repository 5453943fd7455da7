"""Run an export: read the inputs, plan, write to a temporary path, verify, and rename to the final path."""
