"""Patching a folder of ONNX models: rows of the matrices behind the token ids and in front of the logits."""
