"""The content that an artifact must have, computed from the base checkpoint and the adapters."""
