"""Writes an adapter's token rows into an existing folder of ONNX models."""
