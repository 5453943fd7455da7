"""Reads ONNX models and folders of ONNX models."""
