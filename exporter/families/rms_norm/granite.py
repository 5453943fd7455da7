"""The decoder of Granite, which is Llama's architecture with four multipliers.

Source: transformers' GraniteConfig and GraniteForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION_BIASES, MLP_BIASES
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import LLAMA_KEYS, MOST_LINEARS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a granite config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    biases: frozenset[Role] = ATTENTION_BIASES if settings.flag("attention_bias", False) else frozenset()
    biases |= MLP_BIASES if settings.flag("mlp_bias", False) else frozenset()
    spec = like_llama("granite", config, biases=biases)
    return replace(
        spec,
        attention=replace(spec.attention, scale=settings.number("attention_multiplier", 1.0)),
        embed_scale=settings.number("embedding_multiplier", 1.0),
        residual_scale=settings.number("residual_multiplier", 1.0),
        logit_scale=1 / settings.number("logits_scaling", 1.0),
    )


FAMILY: Final = Family(
    model_type="granite",
    describe=describe,
    llama_cpp=Architecture(
        name="granite",
        keys=LLAMA_KEYS | {"attention.scale", "embedding_scale", "residual_scale", "logit_scale"},
        head_length="never",
        interleaved=True,
        biases=MOST_LINEARS,
        copies_prefix_space=True,
        logit_scale_divides=True,
    ),
)
