"""One description of a decoder, read from a Hugging Face config, used by the GGUF and the ONNX writer alike.

A family file states two things: ``describe`` (config → ``DecoderSpec``) and ``TENSORS`` (checkpoint name → role).
Writers work from roles and numbers; they never look at ``model_type``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal


class Role(Enum):
    """What a tensor does in a decoder. The value is the role's dotted path inside a graph."""

    EMBED = "embed_tokens"
    FINAL_NORM = "norm"
    HEAD = "lm_head"
    ATTN_NORM = "input_layernorm"
    Q = "self_attn.q_proj"
    K = "self_attn.k_proj"
    V = "self_attn.v_proj"
    ATTN_OUT = "self_attn.o_proj"
    MLP_NORM = "post_attention_layernorm"
    GATE = "mlp.gate_proj"
    UP = "mlp.up_proj"
    DOWN = "mlp.down_proj"


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor goes: role, layer (None outside the stack), and weight or bias."""

    role: Role
    layer: int | None
    part: Literal["weight", "bias"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding on the first ``dims`` of each head, pairing i with i + dims/2 (the Hugging Face order).

    ``scaling`` is the parameter table of the config's rope type (``rope_type`` "linear" or "llama3"), or None.
    """

    dims: int
    theta: float
    scaling: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention; ``scale`` multiplies q·k before the softmax."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """down(activation(gate(x)) * up(x))."""

    inner: int
    activation: Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A pre-norm decoder: x += attn(norm(x)); x += mlp(norm(x)); logits = head(norm(x)).

    Which linears have a bias follows from the tensors of the checkpoint: a bias that is there is used.
    """

    family: str
    vocab: int
    hidden: int
    layers: int
    max_positions: int
    rms_eps: float
    rope: Rope
    attention: Attention
    mlp: Mlp
    slots: Mapping[str, Slot]  # checkpoint tensor name → slot, for every tensor the family can hold


@dataclass(frozen=True, slots=True)
class Family:
    """A row of the family table."""

    model_type: str
    describe: Callable[[Mapping[str, Any]], DecoderSpec]
