"""ttexport: merge taught tokens into a model, write it for every runtime, and prove that it is the same model."""
