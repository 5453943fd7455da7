"""The encoders of images and sounds of a model, in a GGUF of their own that llama.cpp loads beside the text model."""
