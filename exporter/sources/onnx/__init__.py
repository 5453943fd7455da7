"""ONNX models and folders of them."""
