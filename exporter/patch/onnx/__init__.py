"""Writes an adapter's trained embedding rows into an existing folder of ONNX models."""
