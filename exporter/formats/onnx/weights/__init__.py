"""Weights of ONNX graphs: precisions, blocks of quantised values, external data."""
