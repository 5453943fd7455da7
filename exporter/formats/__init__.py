"""The writers, a package per format; each consumes a ``MergedModel`` and knows nothing of adapters."""
