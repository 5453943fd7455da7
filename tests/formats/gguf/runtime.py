"""llama.cpp through its C interface: logits of every position, and tokens of a text."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np

from exporter.tensors import Array


def _quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """llama.cpp reports every tensor it loads on stderr otherwise."""


# Kept for the lifetime of the process: the library holds no reference.
_QUIET = llama_cpp.llama_log_callback(_quiet)
llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))


@contextmanager
def _model(path: Path, *, vocab_only: bool) -> Iterator[Any]:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def logits(path: Path, token_ids: Sequence[int], *, lora: Path | None = None) -> Array:
    """One full pass: (len(token_ids), vocab) float32. lora: an adapter to apply."""
    count = len(token_ids)
    with _model(path, vocab_only=False) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(32, count)
        params.n_threads = params.n_threads_batch = 2
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # float32, so that the test measures the file and not the cache's rounding.
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(model, params)
        if lora is not None:
            adapter = llama_cpp.llama_adapter_lora_init(model, str(lora).encode())
            if not adapter:
                raise RuntimeError(f"llama.cpp does not load {lora}")
            scales = (ctypes.c_float * 1)(1.0)
            llama_cpp.llama_set_adapters_lora(context, (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), 1, scales)
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token_id in enumerate(token_ids):
                batch.token[index], batch.pos[index] = token_id, index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama.cpp does not run {path}")
            vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            flat = llama_cpp.llama_get_logits(context)
            return np.ctypeslib.as_array(flat, (count, vocab)).copy()
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)


def tokenize(path: Path, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
    """Token ids of each text, special tokens in the text parsed."""
    out = []
    with _model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        for text in texts:
            data = text.encode()
            buffer = (llama_cpp.llama_token * (len(data) + 8))()
            count = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, len(buffer), add_special, True)
            if count < 0:
                raise RuntimeError(f"{text!r} gives more tokens than it has bytes")
            out.append(list(buffer[:count]))
    return out


def special_ids(path: Path) -> dict[str, int]:
    """Kind → id (-1 for none) of the special tokens that llama.cpp uses."""
    kinds = ("bos", "eos", "eot", "pad", "sep", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
    with _model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        return {kind: getattr(llama_cpp, f"llama_vocab_{kind}")(vocab) for kind in kinds}


def ends(path: Path) -> set[int]:
    """Ids at which llama.cpp stops generating."""
    with _model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        count = llama_cpp.llama_vocab_n_tokens(vocab)
        return {token_id for token_id in range(count) if llama_cpp.llama_vocab_is_eog(vocab, token_id)}


class TokenKind(NamedTuple):
    """Whether llama.cpp ends generation at a token, and whether the token is a control token."""

    ends: bool
    control: bool


def token_kinds(path: Path) -> list[TokenKind]:
    with _model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        return [
            TokenKind(llama_cpp.llama_vocab_is_eog(vocab, i), llama_cpp.llama_vocab_is_control(vocab, i))
            for i in range(llama_cpp.llama_vocab_n_tokens(vocab))
        ]
