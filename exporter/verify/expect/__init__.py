"""What an artifact must hold, computed from base and adapters."""
