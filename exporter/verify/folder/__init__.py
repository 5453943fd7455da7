"""Check Hugging Face checkpoint folders, and check the auxiliary files in any model folder, for example for ONNX."""
