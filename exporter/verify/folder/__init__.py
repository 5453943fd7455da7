"""Files beside the weights."""
