"""One description of a decoder, read from a Hugging Face config, used by the GGUF and the ONNX writer alike.

A family file states how a config becomes a ``DecoderSpec``, and which checkpoint tensor plays which role. Writers work
from roles and numbers; they never look at ``model_type``. A writer must use every field or refuse a value that it
does not: what it ignores would be a file that computes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal


class Role(Enum):
    """What a tensor does in a decoder. The value is the role's dotted path inside a graph."""

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
    """Where a tensor goes: role, layer (None outside the stack), weight or bias, and which of several.

    member: the expert of an expert's matrix, the head of a norm that is stored head by head; else None.
    optional: the tensor may be missing. Only biases are: one that is there is used.
    """

    role: Role
    layer: int | None
    parameter: Literal["weight", "bias"]
    member: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """Every norm of the decoder: ``offset`` is added to the stored weight; "layer" also subtracts the mean.

    Which norms there are (before or after a block, on queries and keys) follows from the roles of the tensors.
    """

    type: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding on the first ``dims`` of each head, pairing i with i + dims/2 (the Hugging Face order).

    scaling: the parameter table of the config's rope type (``rope_type`` "linear", "llama3", "yarn" or "longrope"),
    or None. original_positions: the context before it was scaled. local_theta: for layers with a window, which are
    never scaled; None: as the others. interleaved: pairs 2i with 2i + 1 instead. skipped: layers without any position.
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

    qk_norm: "head" normalises each head with one shared weight (head_dim,), "each" with a weight a head
    (heads, head_dim), "all" the whole projection with one weight (heads * head_dim,); before the rotary embedding.
    qkv: one matrix each, or one matrix for all: queries, then keys, then values ("blocks"), or these three for each
    head in turn ("heads"). windowed: the layers in which a query sees only its last ``window`` positions, itself
    counted. softcap c: scores become c * tanh(score / c).
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

    With the role GATE_UP both are one matrix, gate first. "gelu" is the exact form with the error function.
    """

    inner: int
    activation: Literal["silu", "gelu", "gelu_tanh"]
    gated: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """A router's softmax picks ``top_k`` of ``experts`` gated MLPs of width ``inner``, in every layer.

    normalised: the chosen probabilities are divided by their sum.
    """

    experts: int
    top_k: int
    inner: int
    normalised: bool


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder: x += attn(norm(x)); x += mlp(norm(x)); logits = head(norm(x)).

    A norm whose role has no tensor is left out: without ATTN_NORM attention reads x itself. ATTN_POST_NORM and
    MLP_POST_NORM normalise what a block gives back, before it is added. parallel: both blocks read the same x, and
    without MLP_NORM the same normalised x. residual_scale multiplies what each block adds; embed_scale the
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
        """Every role that a tensor of this decoder plays."""
        return frozenset(slot.role for slot in self.naming_schemes[0].values())


@dataclass(frozen=True, slots=True)
class Family:
    """A row of the family table; ``targets``: the formats that can hold the model by its decoder alone."""

    model_type: str
    describe: Callable[[Mapping[str, Any]], DecoderSpec]
    targets: tuple[str, ...] = ("gguf", "onnx")
