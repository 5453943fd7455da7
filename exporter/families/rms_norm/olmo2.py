"""The decoder of OLMo 2, with norms on the outputs (not the inputs) of attention and MLP.

Queries and keys are normalised over the whole projection, not head by head.

Source: transformers' Olmo2Config and Olmo2ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, ATTENTION_BIASES, GATED_MLP, QK_NORMS
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role

_POST_NORMS: Final = {
    "post_attention_layernorm": Role.ATTN_POST_NORM,
    "post_feedforward_layernorm": Role.MLP_POST_NORM,
}


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of an olmo2 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    biases = ATTENTION_BIASES if settings.flag("attention_bias", False) else frozenset()
    spec = like_llama("olmo2", config, layer=_POST_NORMS | ATTENTION | QK_NORMS | GATED_MLP, biases=biases)
    return replace(
        spec,
        norm=replace(spec.norm, eps=settings.number("rms_norm_eps", 1e-5)),
        attention=replace(spec.attention, qk_norm="all"),
    )


FAMILY: Final = Family(
    model_type="olmo2",
    describe=describe,
    llama_cpp=Architecture(name="olmo2", keys=BASE_KEYS, head="must", square=True),
)
