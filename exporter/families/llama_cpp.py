"""llama.cpp's architecture of a family: its name, its metadata keys, and the values hard-coded in llama.cpp.

A hard-coded value has no key, so a config with another value cannot be represented in a GGUF.
Sources: the model classes of llama.cpp's converter, and load_arch_hparams, load_arch_tensors and build_arch_graph of
each architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from exporter.families.spec import DecoderSpec, Role

_SIZES: Final = frozenset({"block_count", "context_length", "embedding_length", "feed_forward_length"})
PLAIN_KEYS: Final = _SIZES | {"attention.head_count", "attention.head_count_kv", "norm", "rope.freq_base", "file_type"}
LLAMA_KEYS: Final = PLAIN_KEYS | {"rope.scaling", "vocab_size", "rope.dimension_count"}
BASE_KEYS: Final = PLAIN_KEYS | {"rope.scaling"}
EXPERT_KEYS: Final = frozenset({"expert_count", "expert_used_count"})

QKV: Final = frozenset({Role.Q, Role.K, Role.V, Role.QKV})
MOST_LINEARS: Final = QKV | {Role.ATTN_OUT, Role.GATE, Role.UP, Role.DOWN}
SEQUENTIAL: Final = frozenset({Role.ATTN_OUT, Role.UP, Role.DOWN})

Check = Callable[[DecoderSpec], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A row of the table.

    keys: names below ``{name}.``; "norm" stands for the epsilon, "rope.scaling" for all keys of a scaling.
    head_length: whether the width of an attention head is written always, only if config.json states it, or never.
    interleaved: a rotary pair is two neighbouring rows of a head. head: whether the file may, must or cannot hold an
    untied LM head. biases: linears that may have a bias; needed: linears that must have one.
    scalings: supported rope types. square: the attention heads must fill the hidden size.
    copies_prefix_space: the converter copies the tokenizer's add_prefix_space. logit_scale_divides: the key holds the
    inverse of the factor. check: verifies other hard-coded values; returns the reason for a refusal.
    """

    name: str
    keys: frozenset[str]
    head_length: Literal["always", "stated", "never"] = "stated"
    interleaved: bool = False
    head: Literal["may", "must", "never"] = "may"
    biases: frozenset[Role] = QKV
    needed: frozenset[Role] = frozenset()
    scalings: frozenset[str] = frozenset({"linear", "yarn"})
    square: bool = False
    copies_prefix_space: bool = False
    logit_scale_divides: bool = False
    check: Check = lambda spec: None
