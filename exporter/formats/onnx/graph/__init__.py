"""Build the ONNX graph of a decoder, node by node, from a description of the decoder (``DecoderSpec``)."""
