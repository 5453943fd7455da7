"""The decoder of SmolLM3, which is Llama's architecture with some layers that skip the rotary embedding.

In the published SmolLM3 models, every fourth layer skips the rotary embedding.

Source: transformers' SmolLM3Config and SmolLM3ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.errors import BadInput
from exporter.families.building_blocks import ATTENTION_BIASES, MLP_BIASES, window
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import LLAMA_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a smollm3 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    biases: frozenset[Role] = ATTENTION_BIASES if settings.flag("attention_bias", False) else frozenset()
    biases |= MLP_BIASES if settings.flag("mlp_bias", False) else frozenset()
    spec = like_llama("smollm3", config, max_positions=32768, theta=2000000.0, biases=biases)
    interval = settings.integer("no_rope_layer_interval", 4)
    default = [int((layer + 1) % interval != 0) for layer in range(spec.layers)]
    rotated = default if config.get("no_rope_layers") is None else config["no_rope_layers"]
    if not isinstance(rotated, list) or len(rotated) != spec.layers or not set(rotated) <= {0, 1}:
        raise BadInput(
            f"config.json: no_rope_layers: expected a list of {spec.layers} zeros and ones, found {rotated!r:.80}"
        )
    skipped = frozenset(layer for layer, rotates in enumerate(rotated) if not rotates)
    size, which = None, frozenset[int]()
    if settings.flag("use_sliding_window", False):
        size, which = window("smollm3", settings, spec.layers, only=skipped)
    assert spec.rope is not None
    return replace(
        spec,
        rope=replace(spec.rope, skipped=skipped),
        attention=replace(spec.attention, window=size, windowed=which),
    )


def _no_rope_layers(spec: DecoderSpec) -> str | None:
    fixed = frozenset(range(3, spec.layers, 4))
    if spec.rope and spec.rope.skipped != fixed:
        skipped = sorted(spec.rope.skipped)
        return f"layers without rotary embedding: expected {sorted(fixed)}, which llama.cpp hard-codes, found {skipped}"
    return None


FAMILY: Final = Family(
    model_type="smollm3",
    describe=describe,
    llama_cpp=Architecture(
        name="smollm3", keys=LLAMA_KEYS, interleaved=True, check=_no_rope_layers, copies_prefix_space=True
    ),
)
