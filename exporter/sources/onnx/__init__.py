"""Reads ONNX model files, and folders that contain ONNX model files."""
