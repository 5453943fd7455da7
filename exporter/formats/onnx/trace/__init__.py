"""Trace models without a built-in architecture family into ONNX graphs with torch.onnx."""
