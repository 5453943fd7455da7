"""Rows into an existing folder of ONNX models."""
