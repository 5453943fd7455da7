"""Build the ONNX graph of a decoder, node by node, from the decoder's DecoderSpec."""
