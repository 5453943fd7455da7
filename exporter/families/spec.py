"""The description of a decoder, read from a Hugging Face config and used by both the GGUF and the ONNX writer.

A family's module turns a config into a ``DecoderSpec``, with the role of every checkpoint tensor. Writers use the roles
and numbers of the spec, never ``model_type``. A writer must use every field or refuse the field's value, because an
artifact that ignores a field computes a different model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal


class Role(Enum):
    """The role of a tensor in a decoder. The enum value is the dotted module path in an ONNX graph."""

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
    """The place of a tensor in the decoder.

    layer: the layer's number, or None outside the layers. member: the expert's number for an expert's matrix, the
    head's number for a norm stored per head, else None. optional: the tensor may be missing from a checkpoint. Only
    biases are optional, and a bias in the checkpoint is always used.
    """

    role: Role
    layer: int | None
    parameter: Literal["weight", "bias"]
    member: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """Parameters of a decoder's norms. ``offset`` is added to the stored weight; "layer" norms also subtract the mean.

    The roles of the tensors determine where norms are applied (before or after a block, on queries and keys).
    """

    type: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding on the first ``dims`` of each head, pairing i with i + dims/2 (the Hugging Face order).

    scaling: the parameter table of the config's rope type (``rope_type`` "linear", "llama3", "yarn" or "longrope"),
    or None. original_positions: the context length before scaling. local_theta: theta of sliding-window layers, which
    are never scaled; None if all layers have the same theta. interleaved: pair 2i with 2i + 1 instead of i with
    i + dims/2. skipped: layers without rotary embedding.
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

    qk_norm: normalisation of queries and keys before the rotary embedding. "head" normalises each head with a shared
    weight (head_dim,). "each" normalises each head with a separate weight (heads, head_dim). "all" normalises the whole
    projection with a weight (heads * head_dim,).
    qkv: how queries, keys and values are stored. "split" means three matrices. "blocks" means a joint matrix with all
    queries, then all keys, then all values. "heads" means a joint matrix with queries, keys and values of each head in
    turn. windowed: layers in which a query attends only to the last ``window`` positions, including the query's own.
    softcap: if c, scores become c * tanh(score / c).
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

    The role GATE_UP is a joint matrix, first gate, then up. "gelu" is the exact GELU with the error function.
    """

    inner: int
    activation: Literal["silu", "gelu", "gelu_tanh"]
    gated: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """A router's softmax selects ``top_k`` of ``experts`` gated MLPs of width ``inner``, in every layer.

    normalised: the probabilities of the selected experts are divided by their sum.
    """

    experts: int
    top_k: int
    inner: int
    normalised: bool


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder: x += attn(norm(x)); x += mlp(norm(x)); logits = head(norm(x)).

    A norm is omitted if no tensor has the norm's role: without ATTN_NORM, attention reads x itself. ATTN_POST_NORM and
    MLP_POST_NORM normalise the output of a block before the output is added to x. parallel: attention and MLP read the
    same x and, without MLP_NORM, share the normalised x. residual_scale multiplies the output of each block.
    embed_scale multiplies the embedding. logit_scale multiplies the logits. logit_softcap: if c, the scaled logits
    become c * tanh(logit / c). naming_schemes: the naming schemes found in checkpoints; each scheme maps every tensor
    name to a slot. transposed: roles stored as (in, out) instead of (out, in). foreign_prefixes: prefixes of tensors
    outside the decoder, for example of a vision tower.
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
