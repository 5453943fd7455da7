"""Run models in several runtimes, such as llama.cpp and ONNX Runtime, with one module per runtime.

The module of a runtime runs in a fresh process, which reads a JSON job, computes logits and writes arrays.
"""
