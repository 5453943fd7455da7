"""The decoder of GLM-4, with norms before and after attention and MLP, and a joint gate and up matrix.

The rotary embedding covers half of each head and pairs adjacent dimensions, as llama.cpp's architecture does.

Source: transformers' Glm4Config and Glm4ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, PRE_NORMS, rope
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, QKV, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role

_LAYER: Final = (
    PRE_NORMS
    | {"post_self_attn_layernorm": Role.ATTN_POST_NORM, "post_mlp_layernorm": Role.MLP_POST_NORM}
    | ATTENTION
    | {"mlp.gate_up_proj": Role.GATE_UP, "mlp.down_proj": Role.DOWN}
)


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a glm4 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    biases = QKV - {Role.QKV} if Settings(config).flag("attention_bias", True) else frozenset()
    plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "partial_rotary_factor")}
    spec = like_llama(
        "glm4",
        {"head_dim": 128, **plain, "rope_scaling": None},
        max_positions=131072,
        eps=1.5625e-07,
        layer=_LAYER,
        biases=biases,
    )
    return replace(spec, rope=replace(rope("glm4", config, spec.attention.head_dim, partial=0.5), interleaved=True))


FAMILY: Final = Family(
    model_type="glm4",
    describe=describe,
    llama_cpp=Architecture(
        name="glm4", keys=BASE_KEYS | {"rope.dimension_count"}, head_length="always", interleaved=True
    ),
)
