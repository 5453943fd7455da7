"""Trace models of families that ttexport does not know into ONNX graphs with torch.onnx."""
