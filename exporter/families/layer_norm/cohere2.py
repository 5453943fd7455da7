"""The decoder of Cohere's Command R7B and Command A, with sliding windows in three of four layers.

Only the layers with a sliding window have a rotary embedding, which pairs adjacent dimensions. llama.cpp hard-codes
that every fourth layer has full attention.

Source: transformers' Cohere2Config and Cohere2ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, ATTENTION_BIASES, GATED_MLP, window
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import PLAIN_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Norm, Role

_LAYER: Final = {"input_layernorm": Role.ATTN_NORM} | ATTENTION | GATED_MLP


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a cohere2 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    spec = like_llama(
        "cohere2",
        config,
        max_positions=8192,
        layer=_LAYER,
        biases=ATTENTION_BIASES if settings.flag("attention_bias", False) else frozenset(),
    )
    period = settings.integer("sliding_window_pattern", 4)
    default = [layer for layer in range(spec.layers) if (layer + 1) % period]
    size, which = window("cohere2", settings, spec.layers, default=4096, only=default)
    assert spec.rope is not None
    rotary = replace(spec.rope, interleaved=True, skipped=frozenset(range(spec.layers)) - which)
    return replace(
        spec,
        norm=Norm(type="layer", eps=settings.number("layer_norm_eps", 1e-5)),
        rope=rotary,
        attention=replace(spec.attention, window=size, windowed=which),
        parallel=True,
        logit_scale=settings.number("logit_scale", 0.0625),
    )


def _every_fourth(spec: DecoderSpec) -> str | None:
    fixed = frozenset(layer for layer in range(spec.layers) if (layer + 1) % 4)
    if spec.attention.windowed != fixed:
        windowed = sorted(spec.attention.windowed)
        return f"sliding-window layers: expected {sorted(fixed)}, which llama.cpp hard-codes, found {windowed}"
    return None


FAMILY: Final = Family(
    model_type="cohere2",
    describe=describe,
    llama_cpp=Architecture(
        name="cohere2",
        keys=PLAIN_KEYS
        | {"logit_scale", "rope.scaling.type", "rope.dimension_count", "vocab_size", "attention.sliding_window"},
        head_length="always",
        interleaved=True,
        head="never",
        biases=frozenset(),
        scalings=frozenset(),
        square=True,
        check=_every_fourth,
    ),
)
