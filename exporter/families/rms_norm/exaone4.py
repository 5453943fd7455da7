"""The decoder of EXAONE 4, with norms on the outputs of attention and MLP, and norms on queries and keys.

The model of 64 layers combines layers with a sliding window and layers with full attention, which have no rotary
embedding. llama.cpp applies windows only in a model of 64 layers.

Source: transformers' Exaone4Config and Exaone4ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, GATED_MLP, QK_NORMS, window
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role

_LAYER: Final = (
    {"post_attention_layernorm": Role.ATTN_POST_NORM, "post_feedforward_layernorm": Role.MLP_POST_NORM}
    | ATTENTION
    | QK_NORMS
    | GATED_MLP
)
_WINDOWED_LAYERS: Final = 64


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of an exaone4 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    spec = like_llama("exaone4", config, eps=1e-5, layer=_LAYER)
    size, which = None, frozenset[int]()
    if config.get("sliding_window", 4096) is not None:
        every = list(range(spec.layers))
        if config.get("layer_types") is None:
            period = settings.integer("sliding_window_pattern", 4)
            every = [layer for layer in every if (layer + 1) % period]
        size, which = window("exaone4", settings, spec.layers, default=4096, only=every)
        size = size or settings.integer("sliding_window", 4096)
    skipped = frozenset(range(spec.layers)) - which if size is not None else frozenset()
    assert spec.rope is not None
    return replace(
        spec,
        rope=replace(spec.rope, skipped=skipped),
        attention=replace(spec.attention, qk_norm="head", window=size, windowed=which),
    )


def _windows(spec: DecoderSpec) -> str | None:
    if (spec.attention.window is not None) != (spec.layers == _WINDOWED_LAYERS):
        wanted = "a number" if spec.layers == _WINDOWED_LAYERS else "null"
        return (
            f"sliding_window: expected {wanted}, which llama.cpp assumes for a model with {spec.layers} layers, "
            f"found {'null' if spec.attention.window is None else spec.attention.window}"
        )
    return None


FAMILY: Final = Family(
    model_type="exaone4",
    describe=describe,
    llama_cpp=Architecture(
        name="exaone4",
        keys=BASE_KEYS | {"vocab_size", "attention.sliding_window", "attention.sliding_window_pattern"},
        scalings=frozenset({"linear", "yarn", "llama3"}),
        square=True,
        check=_windows,
    ),
)
