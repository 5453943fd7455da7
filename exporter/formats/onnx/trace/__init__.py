"""ONNX graphs of models without a family, traced by torch."""
