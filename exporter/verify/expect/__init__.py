"""The expected content of an artifact, computed from base and adapters."""
