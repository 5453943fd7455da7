"""Decoders that normalise by the root mean square, as Llama does."""
