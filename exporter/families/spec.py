"""The description of a decoder, read from a Hugging Face config and used by both the GGUF and the ONNX writer.

A family file turns a config into a ``DecoderSpec``, with the role of every checkpoint tensor. Writers use roles and
numbers, never ``model_type``. A writer must use every field or refuse its value: a file that ignores a field computes
something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal


class Role(Enum):
    """The role of a tensor in a decoder. The value is its dotted path inside a graph."""

    EMBED = "embed_tokens"
    POSITIONS = "embed_positions"
    FINAL_NORM = "norm"
    HEAD = "lm_head"
    ATTN_NORM = "input_layernorm"
    Q = "self_attn.q_proj"
    K = "self_attn.k_proj"
    V = "self_attn.v_proj"
    QKV = "self_attn.qkv_proj"
    Q_NORM = "self_attn.q_norm"
    K_NORM = "self_attn.k_norm"
    ATTN_OUT = "self_attn.o_proj"
    ATTN_POST_NORM = "post_self_attn_layernorm"
    MLP_NORM = "post_attention_layernorm"
    GATE = "mlp.gate_proj"
    UP = "mlp.up_proj"
    GATE_UP = "mlp.gate_up_proj"
    DOWN = "mlp.down_proj"
    MLP_POST_NORM = "post_feedforward_layernorm"
    ROUTER = "mlp.router"
    EXPERT_GATE = "mlp.experts.gate_proj"
    EXPERT_UP = "mlp.experts.up_proj"
    EXPERT_DOWN = "mlp.experts.down_proj"


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor: role, layer (None outside the stack), weight or bias, and its number among several.

    member: the expert of an expert's matrix, or the head of a norm that is stored per head; else None.
    optional: the tensor may be missing. Only biases may; a bias that exists is used.
    """

    role: Role
    layer: int | None
    parameter: Literal["weight", "bias"]
    member: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """All norms of the decoder: ``offset`` is added to the stored weight; "layer" also subtracts the mean.

    The roles of the tensors determine which norms exist (before or after a block, on queries and keys).
    """

    type: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding on the first ``dims`` of each head, pairing i with i + dims/2 (the Hugging Face order).

    scaling: the parameter table of the config's rope type (``rope_type`` "linear", "llama3", "yarn" or "longrope"),
    or None. original_positions: the context before scaling. local_theta: for layers with a window, which are never
    scaled; None: as the others. interleaved: pairs 2i with 2i + 1 instead. skipped: layers without positions.
    """

    dims: int
    theta: float
    scaling: Mapping[str, Any] | None = None
    original_positions: int | None = None
    local_theta: float | None = None
    interleaved: bool = False
    skipped: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention; ``scale`` multiplies q·k before the softmax.

    qk_norm: "head" normalises each head with one shared weight (head_dim,), "each" with a weight per head
    (heads, head_dim), "all" the whole projection with one weight (heads * head_dim,); before the rotary embedding.
    qkv: a matrix each ("split"), or one matrix with all queries, then keys, then values ("blocks"), or with these three
    for every head in turn ("heads"). windowed: the layers in which a query sees only the last ``window`` positions,
    including its own. softcap c: scores become c * tanh(score / c).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qk_norm: Literal["head", "each", "all"] | None = None
    qkv: Literal["split", "blocks", "heads"] = "split"
    window: int | None = None
    windowed: frozenset[int] = frozenset()
    softcap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) if not ``gated``.

    The role GATE_UP joins both in one matrix, gate first. "gelu" is the exact form with the error function.
    """

    inner: int
    activation: Literal["silu", "gelu", "gelu_tanh"]
    gated: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """A router's softmax selects ``top_k`` of ``experts`` gated MLPs of width ``inner``, in every layer.

    normalised: the chosen probabilities are divided by their sum.
    """

    experts: int
    top_k: int
    inner: int
    normalised: bool


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder: x += attn(norm(x)); x += mlp(norm(x)); logits = head(norm(x)).

    A norm without a tensor of its role is omitted: without ATTN_NORM attention reads x itself. ATTN_POST_NORM and
    MLP_POST_NORM normalise the output of a block before it is added. parallel: both blocks read the same x, and
    without MLP_NORM the same normalised x. residual_scale multiplies the output of each block; embed_scale the
    embedding; logit_scale the logits, then logit_softcap c makes them c * tanh(logit / c).
    naming_schemes: the names that checkpoints use, each scheme a complete mapping of tensor name to slot.
    transposed: roles stored as (in, out) instead of (out, in). foreign_prefixes: prefixes of tensors outside the
    decoder, such as those of a vision tower.
    """

    family: str
    vocab: int
    hidden: int
    layers: int
    max_positions: int
    norm: Norm
    rope: Rope | None
    attention: Attention
    mlp: Mlp
    naming_schemes: tuple[Mapping[str, Slot], ...]
    moe: Moe | None = None
    parallel: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    transposed: frozenset[Role] = frozenset()
    foreign_prefixes: tuple[str, ...] = ()

    @cached_property
    def roles(self) -> frozenset[Role]:
        """The roles of this decoder's tensors."""
        return frozenset(slot.role for slot in self.naming_schemes[0].values())
