"""Compute the logits and greedy tokens of a GGUF file in llama.cpp, through the C API wrapped by llama-cpp-python.

The KV cache is float32 and flash attention is off, so that cache rounding does not change the logits.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np

from exporter.tensors import Array
from exporter.verify.runtimes.job import serve

_GGML_TYPE_F32 = 0


class Session:
    """A GGUF model loaded in llama.cpp, with one context.

    Each call of ``logits`` starts with an empty KV cache unless ``past`` is given.
    """

    def __init__(self, path: str, n_ctx: int) -> None:
        """Load the GGUF file at ``path`` with a context of ``n_ctx`` tokens.

        Raises ValueError if llama.cpp cannot load the file.
        """
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise ValueError(f"{path}: llama.cpp cannot load the file")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = n_ctx
        context.type_k = context.type_v = _GGML_TYPE_F32
        context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context.n_threads = context.n_threads_batch = os.cpu_count() or 1
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise ValueError(f"{path}: llama.cpp cannot create a context of {n_ctx} tokens")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def logits(self, ids: Sequence[int], past: int = 0) -> Array:
        """Compute the logits of the tokens ``ids`` as a float32 array of shape (len(ids), vocabulary).

        past: number of positions that are already in the KV cache.
        """
        if past == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for slot, token in enumerate(ids):
                batch.token[slot], batch.pos[slot] = token, past + slot
                batch.n_seq_id[slot], batch.seq_id[slot][0], batch.logits[slot] = 1, 0, 1
            if code := llama_cpp.llama_decode(self.context, batch):
                raise ValueError(f"llama_decode failed with code {code}")
            out = np.empty((len(ids), self.n_vocab), np.float32)
            for slot in range(len(ids)):
                row = llama_cpp.llama_get_logits_ith(self.context, slot)
                out[slot] = np.ctypeslib.as_array(row, (self.n_vocab,))
        finally:
            llama_cpp.llama_batch_free(batch)
        return out

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of ``text``.

        Special tokens in ``text`` are recognised, but no BOS or other special token is added.
        """
        data = text.encode()
        out = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), out, len(out), False, True)
        if count < 0:
            raise ValueError(f"llama_tokenize failed with code {count}")
        return list(out[:count])


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save the logits of sequences, the greedy tokens after prompts, and the token ids of texts.

    The logits of sequence N are saved as ``full.N``, the greedy tokens after prompt N as ``greedy.N``, and the token
    ids of text N as ``tokens.N``. ``job`` has the keys artifact, sequences, more (additional sequences, numbered after
    ``sequences``), greedy_prompts, greedy_tokens (number of tokens to choose) and texts.
    """
    sequences = [*job["sequences"], *job["more"]]
    longest = max(map(len, [*sequences, *job["greedy_prompts"]]))
    with silence():
        session = Session(job["artifact"], n_ctx=longest + job["greedy_tokens"] + 8)
        for number, ids in enumerate(sequences):
            save(f"full.{number}", session.logits(ids))
        for number, prompt in enumerate(job["greedy_prompts"]):
            chosen, ids, past = [], list(prompt), 0
            for _ in range(job["greedy_tokens"]):
                last = session.logits(ids, past)[-1]
                past, ids = past + len(ids), [int(last.argmax())]
                chosen.append(ids[0])
            save(f"greedy.{number}", np.array(chosen, np.int64))
        for number, text in enumerate(job["texts"]):
            save(f"tokens.{number}", np.array(session.tokenize(text), np.int64))


@contextmanager
def silence() -> Iterator[None]:
    """Let llama.cpp write only errors to stderr, so that the last line of stderr is the reason for a failure."""

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # ctypes builds the decorator at run time
    def log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            os.write(2, text)

    llama_cpp.llama_log_set(log, ctypes.c_void_p())
    yield


if __name__ == "__main__":
    serve(compute)
