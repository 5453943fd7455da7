"""The writers, one room a format; each consumes a ``MergedModel`` and knows nothing of adapters."""
