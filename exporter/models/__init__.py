"""Map the module and parameter names of a loaded transformers model to the tensor names in a checkpoint."""
