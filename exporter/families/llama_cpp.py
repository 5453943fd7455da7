"""llama.cpp's model architectures: their names, their metadata keys, and the values hard-coded in llama.cpp.

A value that llama.cpp hard-codes has no metadata key, so a GGUF cannot represent a config with a different value.
Sources: the model classes in llama.cpp's converter, and the functions load_arch_hparams, load_arch_tensors and
build_arch_graph of each architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    """A model architecture of llama.cpp.

    keys: the metadata keys below ``{name}.``; "norm" means the key of the norm's epsilon, and "rope.scaling" means all
    rope scaling keys. head_length: when the width of an attention head is written; "stated" means only if config.json
    contains the width. interleaved: whether rotary pairs are neighbouring rows of a head. head: whether the file may,
    must or must not contain an untied LM head. biases: the linear layers that may have a bias. needed: the linear
    layers that must have a bias. scalings: the supported rope types. square: whether the number of heads times the head
    width must equal the hidden size. copies_prefix_space: whether the converter copies the tokenizer's
    add_prefix_space. logit_scale_divides: whether the metadata key contains the inverse of the logit scale. renamed:
    the tensor names of the roles whose tensors have a different name in this architecture than in most architectures.
    check: a function that compares a decoder with further hard-coded values and returns a reason for refusal, or None.
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
    renamed: Mapping[Role, str] = field(default_factory=dict)
    check: Check = lambda spec: None
