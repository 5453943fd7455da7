"""Each module of this package runs models in a single runtime, such as llama.cpp or ONNX Runtime.

The module of a runtime runs in a fresh process, which reads a JSON job, computes logits and writes arrays.
"""
