"""The decoder of GPT-2, with learned position embeddings, layer norms, and biases on all linear layers.

The weight matrices of GPT-2 are stored as (in, out).

Source: transformers' GPT2Config and GPT2LMHeadModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible
from exporter.families.building_blocks import naming_scheme
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import PLAIN_KEYS, QKV, SEQUENTIAL, Architecture
from exporter.families.spec import Attention, DecoderSpec, Mlp, Norm, Role

_OUTSIDE: Final = {"wte": Role.EMBED, "wpe": Role.POSITIONS, "ln_f": Role.FINAL_NORM}
_LAYER: Final = {
    "ln_1": Role.ATTN_NORM,
    "attn.c_attn": Role.QKV,
    "attn.c_proj": Role.ATTN_OUT,
    "ln_2": Role.MLP_NORM,
    "mlp.c_fc": Role.UP,
    "mlp.c_proj": Role.DOWN,
}
_LINEARS: Final = frozenset({Role.QKV, Role.ATTN_OUT, Role.UP, Role.DOWN})
_BIASES: Final = _LINEARS | {Role.ATTN_NORM, Role.MLP_NORM, Role.FINAL_NORM}


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a gpt2 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    hidden, heads, layers = settings.integer("n_embd", 768), settings.integer("n_head", 12), settings.layers("n_layer")
    if hidden % heads:
        raise BadInput(f"config.json: n_head: expected a divisor of n_embd ({hidden}), found {heads}")
    if config.get("scale_attn_by_inverse_layer_idx") or not settings.flag("scale_attn_weights", True):
        raise NotExpressible("gpt2", "only the default attention scale, 1 / sqrt(head width), is supported")
    return DecoderSpec(
        family="gpt2",
        vocab=settings.integer("vocab_size"),
        hidden=hidden,
        layers=layers,
        max_positions=settings.integer("n_positions", 1024),
        norm=Norm(type="layer", eps=settings.number("layer_norm_epsilon", 1e-5)),
        rope=None,
        attention=Attention(
            heads=heads, kv_heads=heads, head_dim=hidden // heads, scale=(hidden // heads) ** -0.5, qkv="blocks"
        ),
        mlp=Mlp(
            inner=settings.integer("n_inner", 4 * hidden),
            activation=settings.activation("gpt2", "activation_function", "gelu_new", ("gelu", "gelu_tanh")),
            gated=False,
        ),
        # Early checkpoints, saved without an LM head, omit the prefix.
        naming_schemes=tuple(
            naming_scheme(
                layers,
                _LAYER,
                outside={f"{prefix}{name}": role for name, role in _OUTSIDE.items()} | {"lm_head": Role.HEAD},
                prefix=f"{prefix}h.",
                biases=_BIASES,
            )
            for prefix in ("transformer.", "")
        ),
        transposed=_LINEARS,
    )


FAMILY: Final = Family(
    model_type="gpt2",
    describe=describe,
    llama_cpp=Architecture(
        name="gpt2",
        keys=PLAIN_KEYS - {"attention.head_count_kv", "rope.freq_base"},
        head_length="never",
        biases=SEQUENTIAL | QKV,
        needed=SEQUENTIAL,
        square=True,
    ),
)
