"""ttexport merges adapters with new tokens into a model, exports the model for several runtimes, and verifies it."""
