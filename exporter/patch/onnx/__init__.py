"""Patches rows in an existing folder of ONNX models."""
