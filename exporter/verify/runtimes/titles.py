"""What people call the runtimes, in progress lines and reports."""

from __future__ import annotations

from typing import Final

#: Module of this package that runs artifacts → what computes in it.
TITLES: Final = {
    "merged": "transformers",
    "gguf_in_transformers": "transformers",
    "llamacpp": "llama.cpp",
    "onnx_runtime": "ONNX Runtime",
    "onnx_seq2seq": "ONNX Runtime",
}
