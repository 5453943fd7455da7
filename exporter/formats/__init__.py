"""Writers of output formats: one package per format, which converts a ``MergedModel`` without knowing its adapters."""
