"""One module per runtime, such as llama.cpp or ONNX Runtime, that runs a model.

The module of a runtime is started as a new process, which reads a JSON job, computes logits and writes arrays.
"""
