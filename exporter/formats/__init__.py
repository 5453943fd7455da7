"""The writers: each format has a package, which takes a ``MergedModel`` and does not depend on adapters."""
