"""Prepare the weights of ONNX graphs: precisions, block quantisation, and layout of the external data files."""
