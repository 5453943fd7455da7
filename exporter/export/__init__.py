"""Run an export: read the inputs, plan the artifacts, write temporary files, verify the files, and rename them."""
