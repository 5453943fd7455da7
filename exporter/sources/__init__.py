"""Reads model files (GGUF, safetensors, ONNX), checkpoint folders and adapters.

Opening a file reads only its header; tensor bytes are read on demand.
"""
