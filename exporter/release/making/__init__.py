"""Making a release: artifacts, their cache, the journal, pieces made elsewhere."""
