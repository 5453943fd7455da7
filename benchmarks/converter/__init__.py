"""Compare merges by llama.cpp's converter with the converter alone."""
