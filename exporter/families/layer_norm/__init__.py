"""Model families with layer norms, which normalise mean and variance, such as GPT-2."""
