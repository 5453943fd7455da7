"""The decoder of StarCoder 2, with layer norms, an MLP without a gate, and biases on every linear layer.

Source: transformers' Starcoder2Config and Starcoder2ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, ATTENTION_BIASES, PRE_NORMS, heads, naming_scheme, rope, window
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, QKV, SEQUENTIAL, Architecture
from exporter.families.spec import Attention, DecoderSpec, Mlp, Norm, Role

_LAYER: Final = PRE_NORMS | ATTENTION | {"mlp.c_fc": Role.UP, "mlp.c_proj": Role.DOWN}
_NORMS: Final = frozenset({Role.FINAL_NORM, Role.ATTN_NORM, Role.MLP_NORM})
_LINEARS: Final = ATTENTION_BIASES | {Role.UP, Role.DOWN}


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a starcoder2 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    count, kv_heads, head_dim = heads(settings)
    layers = settings.layers()
    size, which = window("starcoder2", settings, layers)
    biases = _NORMS | (_LINEARS if settings.flag("use_bias", True) else frozenset())
    return DecoderSpec(
        family="starcoder2",
        vocab=settings.integer("vocab_size"),
        hidden=settings.integer("hidden_size"),
        layers=layers,
        max_positions=settings.integer("max_position_embeddings", 4096),
        norm=Norm(type="layer", eps=settings.number("norm_epsilon", 1e-5)),
        rope=rope("starcoder2", config, head_dim),
        attention=Attention(
            heads=count, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5, window=size, windowed=which
        ),
        mlp=Mlp(
            inner=settings.integer("intermediate_size"),
            activation=settings.activation("starcoder2", "hidden_act", "gelu_pytorch_tanh", ("gelu", "gelu_tanh")),
            gated=False,
        ),
        naming_schemes=(naming_scheme(layers, _LAYER, biases=biases),),
    )


FAMILY: Final = Family(
    model_type="starcoder2",
    describe=describe,
    llama_cpp=Architecture(name="starcoder2", keys=BASE_KEYS, biases=SEQUENTIAL | QKV, needed=SEQUENTIAL, square=True),
)
