"""Determine the name of each checkpoint tensor in a GGUF file, and the order of the tensor's elements in the file.

The GGUF names and element orders are determined without using the code that writes GGUF files. GGUF tensor names are
looked up in the tables of the gguf package. The order of elements in a GGUF tensor follows llama.cpp's converter. For
architectures whose rotary embedding pairs neighbouring elements, llama.cpp's converter interleaves the rows of the
query and key matrices. For Gemma, llama.cpp's converter adds 1 to the norm weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from exporter.tensors import Array
from exporter.verify.gguf.hyperparameters import hyperparameters

#: model_type of a config → general.architecture. Source: the model classes of llama.cpp's converter.
ARCHITECTURES: Final = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "olmo2": "olmo2",
    "granite": "granite",
    "starcoder2": "starcoder2",
    "cohere": "command-r",
    "stablelm": "stablelm",
    "smollm3": "smollm3",
    "seed_oss": "seed_oss",
    "arcee": "arcee",
    "ernie4_5": "ernie4_5",
    "helium": "llama",
    "ministral3": "mistral3",
    "mistral3": "mistral3",
    "hunyuan_v1_dense": "hunyuan-dense",
    "olmo3": "olmo2",
    "exaone4": "exaone4",
    "glm4": "glm4",
    "cohere2": "cohere2",
    "olmo": "olmo",
    "nemotron": "nemotron",
}
#: Architectures with interleaved queries and keys.
_INTERLEAVED: Final = frozenset({"llama", "granite", "smollm3", "arcee", "mistral3", "olmo"})
#: Model types whose checkpoints already contain the queries and keys in interleaved order.
_STORED_INTERLEAVED: Final = frozenset({"helium"})
_ONE_ADDED: Final = frozenset({"gemma", "gemma2", "gemma3", "nemotron"})
#: GPT-2 stores the weights of its linear layers as (in, out).
_TRANSPOSED: Final = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
#: Members of a stack: experts, and norms that are stored per head.
_MEMBER: Final = re.compile(r"\.(experts|norms)\.(\d+)\.")
#: Prefixes of the text model inside a multimodal model.
_WRAPPER: Final = re.compile(r"^(model\.)?(?:language_model|text_model)\.(model\.)?|^(?=model\.vision)")
#: Prefix of the head of the text model inside a multimodal model.
_HEAD_WRAPPER: Final = re.compile(r"^(model\.)?language_model\.(?=lm_head)")
VOCABULARY: Final = ("token_embd.weight", "output.weight")

#: Function that converts a whole tensor from the checkpoint's order of elements to the GGUF's order.
Arrange = Callable[[Array], Array]


def map_tensors(names: Mapping[str, Any], arch: str, layers: int) -> tuple[dict[str, list[str]], list[str]]:
    """Map each GGUF tensor name to the names of the checkpoint tensors that contain the values of the GGUF tensor.

    Returns a tuple of two items: a dict from GGUF tensor name to a list of checkpoint tensor names, with several names
    if the GGUF tensor is a stack, and a list of the checkpoint tensors without a GGUF tensor.

    Raises KeyError if the verification does not know the order of elements for the architecture ``arch``.
    """
    if arch not in ARCHITECTURES.values():
        raise KeyError(arch)
    import gguf  # The import takes 0.25 s and is needed only by checks of every weight.

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[arch], layers)
    by_name: dict[str, list[tuple[int, str]]] = {}
    unknown = []
    # A checkpoint that was saved from AutoModel has no prefix before the names of the base model's tensors.
    prefix = "model." if "embed_tokens.weight" in names else "gpt_neox." if "embed_in.weight" in names else ""
    for stored in names:
        plain = _HEAD_WRAPPER.sub("", stored)
        if not plain.startswith(("lm_head.", "embed_out.")):
            plain = _WRAPPER.sub("model.", prefix + stored)
        member = _MEMBER.search(plain)
        key = _MEMBER.sub(lambda match: "." if match[1] == "norms" else ".experts.", plain)
        name = table.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            unknown.append(stored)
        else:
            by_name.setdefault(name, []).append((int(member[2]) if member else 0, stored))
    return {name: [stored for _, stored in sorted(parts)] for name, parts in by_name.items()}, unknown


def arrangement(arch: str, name: str, config: Mapping[str, Any]) -> Arrange | None:
    """Return a function that converts a checkpoint tensor to GGUF element order, or None if the orders are equal.

    name: the name of the GGUF tensor.
    """
    part = re.sub(r"^blk\.\d+\.", "", name)
    numbers = hyperparameters(config)
    heads = numbers.get("attention.head_count")
    interleaved = arch in _INTERLEAVED and config.get("model_type") not in _STORED_INTERLEAVED
    if interleaved and part in ("attn_q.weight", "attn_q.bias"):
        return _interleave(heads)
    if interleaved and part in ("attn_k.weight", "attn_k.bias"):
        return _interleave(numbers.get("attention.head_count_kv") or heads)
    if arch == "gpt2" and part in _TRANSPOSED:
        return lambda value: value.T
    if arch == "gptneox" and part.startswith("attn_qkv."):
        return _by_use(heads)
    if arch in _ONE_ADDED and part.endswith("norm.weight"):
        return lambda value: value.astype(np.float32) + np.float32(1)
    return None


def _interleave(heads: Any) -> Arrange:
    """Return a function that interleaves the first and the second half of the rows within each attention head."""
    return lambda value: value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _by_use(heads: Any) -> Arrange:
    """Return a function that reorders the rows of a fused QKV tensor from per-head order to all Q, all K, all V."""
    return lambda value: value.reshape(heads, 3, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)


def generated(config: Mapping[str, Any]) -> dict[str, Array]:
    """Compute, from ``config``, the rope scaling tensors that a GGUF contains in addition to the checkpoint's tensors.

    Returns a dict from the GGUF tensor name to a float32 array of shape (rotary dimensions / 2,).
    """
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = table.get("rope_type", table.get("type")) if isinstance(table, Mapping) else None
    if rope_type == "longrope":
        names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {name: np.asarray(table[key], np.float32) for name, key in names.items()}
    if rope_type == "llama3":
        return {"rope_freqs.weight": _llama3(table, hyperparameters(config))}
    return {}


def _llama3(table: Mapping[str, Any], numbers: Mapping[str, Any]) -> Array:
    """Return the number by which llama3 rope scaling divides each rotary frequency.

    Source of the formula: the function _compute_llama3_parameters in transformers.
    """
    dims = numbers["rope.dimension_count"]
    low, high, factor = table["low_freq_factor"], table["high_freq_factor"], table["factor"]
    waves = 2 * math.pi * numbers["rope.freq_base"] ** (np.arange(0, dims, 2) / dims)
    rotations = table["original_max_position_embeddings"] / waves
    share = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    divisors: Array = (1.0 / ((1 - share) / factor + share)).astype(np.float32)
    return divisors
