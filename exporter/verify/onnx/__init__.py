"""Checks of ONNX folders."""
