"""Run an export: plan the artifacts, write and verify temporary files, and give the files their final names."""
