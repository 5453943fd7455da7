"""The description of a decoder, read from a Hugging Face config and used by both the GGUF writer and the ONNX writer.

The module of a model family converts a config to a ``DecoderSpec``, which assigns a role to every checkpoint tensor.
The writers of GGUF and ONNX use only the ``DecoderSpec``, never the config's ``model_type``. A writer that does not
support the value of a field must raise an error, because an artifact that ignored the field would compute different
logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal


class Role(Enum):
    """The role of a tensor in a decoder.

    The enum value of a role is the module path that names the role in ONNX graphs.
    """

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
    """The position of a tensor in the decoder: its role, its layer and, if it belongs to an expert or head, a number.

    layer: the number of the layer, or None for a tensor outside the layers. member: the expert's number for an expert's
    matrix, the head's number for a norm that is stored per head, otherwise None. optional: whether the tensor may be
    missing from a checkpoint. Only biases are optional, and a bias that a checkpoint contains is always used.
    """

    role: Role
    layer: int | None
    parameter: Literal["weight", "bias"]
    member: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """Parameters of a decoder's norms.

    offset: a number that is added to the stored weight. type: "layer" norms subtract the mean, "rms" norms do not.
    bare: whether the norms before attention, before the MLP and before the head have neither weight nor bias.

    The roles of the norm tensors determine where norms are applied (before or after a block, on queries and keys).
    """

    type: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0
    bare: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of the first ``dims`` elements of each head, which pairs element i with element i + dims/2.

    scaling: the parameter table of the config's rope type (``rope_type`` "linear", "llama3", "yarn" or "longrope"), or
    None. original_positions: the context length before rope scaling. local_theta: the theta of sliding-window layers,
    to which rope scaling is never applied, or None if all layers have the same theta. interleaved: whether element 2i
    is paired with element 2i + 1, instead of element i with element i + dims/2 as in most Hugging Face models. skipped:
    the layers without rotary embedding. stretched: whether ``theta`` contains a fixed factor ("alpha") that extends the
    context.
    """

    dims: int
    theta: float
    scaling: Mapping[str, Any] | None = None
    original_positions: int | None = None
    local_theta: float | None = None
    interleaved: bool = False
    skipped: frozenset[int] = frozenset()
    stretched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention, in which ``scale`` multiplies q·k before the softmax.

    qk_norm: how queries and keys are normalised, before the rotary embedding or, with ``norm_after_rope``, after the
    rotary embedding. "head" normalises each head with a shared
    weight (head_dim,). "each" normalises each head with a separate weight (heads, head_dim). "all" normalises the whole
    projection with a weight (heads * head_dim,).
    qkv: how queries, keys and values are stored. "split" means three matrices. "blocks" means a joint matrix with all
    queries, then all keys, then all values. "heads" means a joint matrix with the query, key and value rows of the
    first head, then of the second head, and so on. windowed: the layers in which a query attends only to the last
    ``window`` positions, including the query's own position. softcap: if set to c, each score becomes c * tanh(score /
    c). log_growth: if set to b, the query at position p is multiplied by 1 + b * log(1 + floor(p / n)), where n is the
    context length before rope scaling. clip: if set to c, queries, keys and values are limited to [-c, c] after their
    projection.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qk_norm: Literal["head", "each", "all"] | None = None
    norm_after_rope: bool = False
    qkv: Literal["split", "blocks", "heads"] = "split"
    window: int | None = None
    windowed: frozenset[int] = frozenset()
    softcap: float | None = None
    log_growth: float | None = None
    clip: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """An MLP that computes down(activation(gate(x)) * up(x)), or down(activation(up(x))) if not ``gated``.

    A tensor with the role GATE_UP contains the rows of the gate matrix followed by the rows of the up matrix. The
    activation "gelu" is the exact GELU with the error function, and "relu2" is the square of ReLU.
    """

    inner: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"]
    gated: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """A mixture of experts in every layer: a router's softmax selects ``top_k`` of ``experts`` MLPs of width ``inner``.

    Every expert is a gated MLP. normalised: whether the probabilities of the selected experts are divided by their sum.
    """

    experts: int
    top_k: int
    inner: int
    normalised: bool


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder that computes x += attn(norm(x)), x += mlp(norm(x)) in each layer, and logits = head(norm(x)).

    If no tensor has the role of a norm and the norms are not bare, the decoder omits the norm: without ATTN_NORM,
    attention reads x itself. The norms ATTN_POST_NORM and MLP_POST_NORM normalise the output of a block before the
    output is added to x. parallel:
    whether attention and MLP read the same x; without MLP_NORM, attention and MLP then also share the normalised x.
    residual_scale: a factor that multiplies the output of each block. embed_scale: a factor that multiplies the
    embedding. logit_scale: a factor that multiplies the logits. logit_softcap: if set to c, the scaled logits become c
    * tanh(logit / c). naming_schemes: the naming schemes found in checkpoints, each of which maps every tensor name to
    a slot. transposed: the roles whose matrices are stored as (in, out) rather than (out, in). foreign_prefixes: the
    name prefixes of tensors outside the decoder, for example of a vision tower.
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
