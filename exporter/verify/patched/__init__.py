"""Check that a patch changed only the trained token rows of a GGUF file or ONNX folder."""
