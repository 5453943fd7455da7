"""Making a release: the artifacts, the cache of artifacts, the journal, and pieces made elsewhere."""
