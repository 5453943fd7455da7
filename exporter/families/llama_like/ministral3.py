"""The decoder of Ministral 3, which is Llama's architecture with YaRN and with queries that grow with the position.

The text model of a multimodal Mistral 3 is a Ministral 3, or a Mistral in older models. llama.cpp reads the growth of
the queries and YaRN's ``mscale_all_dim`` from metadata keys of the architecture mistral3, and ignores a sliding window.

Source: transformers' Ministral3Config, Mistral3Config and their model classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.families.building_blocks import inside_multimodal, text_config, window
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import LLAMA_KEYS, QKV, Architecture
from exporter.families.rms_norm import mistral
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role

#: The rope parameters of a config without rope parameters. Source: Ministral3Config.__post_init__.
_ROPE: Final = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a ministral3 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    config = {"head_dim": 128, **config}
    if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
        config["rope_parameters"] = _ROPE
    spec = like_llama("ministral3", config, max_positions=262144, eps=1e-5)
    rotary = spec.rope
    if rotary is None or rotary.scaling is None or rotary.scaling["rope_type"] != "yarn":
        raise NotExpressible("ministral3", "rope_type: expected yarn, the only rope type of this model family")
    size, which = window("ministral3", Settings(config), spec.layers)
    growth = Settings(rotary.scaling).number("llama_4_scaling_beta")
    return replace(spec, attention=replace(spec.attention, window=size, windowed=which, log_growth=growth))


def describe_multimodal(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the text decoder of a multimodal mistral3 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    text = text_config(config)
    text_type = text.get("model_type", "mistral")
    if text_type not in ("mistral", "ministral3"):
        raise NotExpressible("mistral3", f"a text model of type {text_type!r:.80} is not supported")
    spec = describe(text) if text_type == "ministral3" else mistral.describe(text)
    return replace(inside_multimodal(spec), family="mistral3")


_MISTRAL3: Final = Architecture(
    name="mistral3",
    keys=LLAMA_KEYS | {"rope.scaling.yarn_log_multiplier", "attention.temperature_scale"},
    head_length="always",
    interleaved=True,
    biases=QKV | {Role.ATTN_OUT},
    scalings=frozenset({"yarn"}),
    copies_prefix_space=True,
)

FAMILIES: Final = (
    Family(model_type="ministral3", describe=describe, llama_cpp=_MISTRAL3),
    # An ONNX folder contains the multimodal config, so clients would look for the vision tower.
    Family(model_type="mistral3", describe=describe_multimodal, llama_cpp=_MISTRAL3, targets=("gguf",)),
)
