"""Check ONNX folders and model files against the base checkpoint and the adapters."""
