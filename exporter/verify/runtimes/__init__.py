"""Modules that run a model, with one module for each runtime, such as llama.cpp or ONNX Runtime.

The module of a runtime is started as a new process, which reads a JSON job, computes logits and writes arrays.
"""
