"""ttexport merges taught tokens into a model, writes the model for every runtime, and verifies the written model."""
