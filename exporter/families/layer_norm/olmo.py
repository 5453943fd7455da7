"""The decoder of OLMo 1, which is Llama's architecture with layer norms without weights, and with limited projections.

llama.cpp stores queries and keys in the order of Llama's.

Source: transformers' OlmoConfig and OlmoForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, ATTENTION_BIASES, GATED_MLP
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Norm, Role

_OUTSIDE: Final = {"model.embed_tokens": Role.EMBED, "lm_head": Role.HEAD}


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of an olmo config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    biases = ATTENTION_BIASES if settings.flag("attention_bias", False) else frozenset()
    spec = like_llama("olmo", config, layer=ATTENTION | GATED_MLP, outside=_OUTSIDE, biases=biases)
    clip = None if config.get("clip_qkv") is None else settings.number("clip_qkv")
    return replace(spec, norm=Norm(type="layer", eps=1e-5, bare=True), attention=replace(spec.attention, clip=clip))


FAMILY: Final = Family(
    model_type="olmo",
    describe=describe,
    llama_cpp=Architecture(
        name="olmo", keys=BASE_KEYS | {"attention.clamp_kqv"}, interleaved=True, biases=frozenset(), square=True
    ),
)
