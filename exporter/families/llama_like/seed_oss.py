"""The decoder of Seed-OSS, which is Llama's architecture with biases on the query, key and value projections.

llama.cpp names the norm before the MLP like a norm after attention.

Source: transformers' SeedOssConfig and SeedOssForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exporter.families.building_blocks import MLP_BIASES
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a seed_oss config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    biases: frozenset[Role] = frozenset()
    if settings.flag("attention_bias", True):
        biases |= {Role.Q, Role.K, Role.V}
    if settings.flag("attention_out_bias", False):
        biases |= {Role.ATTN_OUT}
    if settings.flag("mlp_bias", False):
        biases |= MLP_BIASES
    return like_llama("seed_oss", {"head_dim": 128, **config}, max_positions=524288, biases=biases)


FAMILY: Final = Family(
    model_type="seed_oss",
    describe=describe,
    llama_cpp=Architecture(
        name="seed_oss", keys=BASE_KEYS, head_length="always", renamed={Role.MLP_NORM: "post_attention_norm"}
    ),
)
