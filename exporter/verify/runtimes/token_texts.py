"""Decode tokens with the vocabulary of a GGUF file in llama.cpp, without loading the model's weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llama_cpp
import numpy as np

from exporter.tensors import Array
from exporter.verify.runtimes.job import serve
from exporter.verify.runtimes.llamacpp import silence


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save the decoded bytes of token sequence N, including special tokens, as ``text.N``.

    ``job`` has the keys artifact and ids (token sequences to decode).
    """
    with silence():
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(job["artifact"].encode(), params)
        if not model:
            raise ValueError(f"{job['artifact']}: llama.cpp cannot load the vocabulary")
        vocab = llama_cpp.llama_model_get_vocab(model)
        for number, ids in enumerate(job["ids"]):
            save(f"text.{number}", np.frombuffer(_text(vocab, ids), np.uint8))


def _text(vocab: Any, ids: Sequence[int]) -> bytes:
    tokens = (llama_cpp.llama_token * len(ids))(*ids)
    size = 64 * len(ids) + 64
    while True:
        out = ctypes.create_string_buffer(size)
        count = int(llama_cpp.llama_detokenize(vocab, tokens, len(ids), out, size, False, True))
        if count >= 0:
            return out.raw[:count]
        size = -count


if __name__ == "__main__":
    serve(compute)
