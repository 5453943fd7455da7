"""Read the inputs of a training run: the base model, the data and the vocabulary."""
