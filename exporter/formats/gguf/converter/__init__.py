"""Write GGUFs of models without a built-in family, by running llama.cpp's own converter on an overlay checkpoint."""
