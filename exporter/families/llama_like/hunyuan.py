"""The decoder of Hunyuan (dense), which is Llama's architecture with norms on queries and keys after the rotation.

Published models multiply theta by a fixed factor ("alpha"). llama.cpp's converter writes the product as theta, and a
context of 262,144 tokens. The GGUF ends texts at the tokens at which transformers ends texts; llama.cpp's converter
writes ``eod_token_id`` of the config instead.

Source: transformers' HunYuanDenseV1Config and HunYuanDenseV1ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION_BIASES, LAYER, rope_table
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role

_NORMS: Final = {"self_attn.query_layernorm": Role.Q_NORM, "self_attn.key_layernorm": Role.K_NORM}


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a hunyuan_v1_dense config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    table = rope_table(config)
    stretched = table["rope_type"] == "dynamic" and bool(table.get("alpha"))
    if stretched:
        theta = {"rope_theta": 10000.0, **config, **table}["rope_theta"]
        rest = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
        config = {**rest, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    biases = ATTENTION_BIASES if Settings(config).flag("attention_bias", False) else frozenset()
    spec = like_llama("hunyuan_v1_dense", config, eps=1e-5, layer=LAYER | _NORMS, biases=biases)
    assert spec.rope is not None
    width, rotary = spec.attention.head_dim, spec.rope
    if stretched and width > 2:
        alpha = Settings(table).number("alpha")
        rotary = replace(rotary, theta=rotary.theta * alpha ** (width / (width - 2)), stretched=True)
    return replace(spec, rope=rotary, attention=replace(spec.attention, qk_norm="head", norm_after_rope=True))


FAMILY: Final = Family(
    model_type="hunyuan_v1_dense",
    describe=describe,
    llama_cpp=Architecture(name="hunyuan-dense", keys=BASE_KEYS),
)
