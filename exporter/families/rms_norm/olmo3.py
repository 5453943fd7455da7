"""The decoder of OLMo 3, which is OLMo 2 with sliding windows in three of four layers.

In the layers with a sliding window, the rotary embedding is never scaled. llama.cpp stores OLMo 3 under the
architecture of OLMo 2, reads the windows from metadata, and rotates all layers with the same theta.

Source: transformers' Olmo3Config and Olmo3ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible
from exporter.families.building_blocks import rope, window
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, Architecture
from exporter.families.rms_norm import olmo2
from exporter.families.spec import DecoderSpec

_THETA: Final = 500000.0
_PLAIN: Final = {"rope_type": "default", "rope_theta": _THETA}


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of an olmo3 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    full, local = _rope_tables(config)
    plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    spec = replace(olmo2.describe(plain), family="olmo3")
    rotary = rope("olmo3", plain | {"rope_parameters": full}, spec.attention.head_dim, theta=_THETA)
    if local["rope_type"] != "default":
        raise NotExpressible("olmo3", f"rope type {local['rope_type']!r:.80} in sliding-window layers is not supported")
    theta = Settings(local).number("rope_theta")
    if rotary.scaling is not None or theta != rotary.theta:
        rotary = replace(rotary, local_theta=theta)
    default = [layer for layer in range(spec.layers) if (layer + 1) % 4]
    size, which = window("olmo3", Settings(config), spec.layers, default=4096, only=default)
    return replace(spec, rope=rotary, attention=replace(spec.attention, window=size, windowed=which))


def _rope_tables(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rope parameters of the layers with full attention and of the layers with a sliding window.

    Source: Olmo3Config.convert_rope_params_to_dict.
    """
    stored, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    tables = [stored, scaling]
    if isinstance(stored, Mapping):
        tables += [stored.get(name) or {} for name in ("full_attention", "sliding_attention")]
    if not all(isinstance(table, Mapping) for table in tables):
        raise BadInput(f"config.json: rope_parameters: expected an object for each layer type, found {stored!r:.80}")
    own = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    _, _, full, local = tables
    return _PLAIN | own | full | scaling, _PLAIN | local


def _one_theta(spec: DecoderSpec) -> str | None:
    rotary = spec.rope
    if rotary and rotary.local_theta is not None and rotary.local_theta != rotary.theta:
        return (
            f"rope_theta of sliding-window layers: expected {rotary.theta:g}, the theta of all layers in llama.cpp, "
            f"found {rotary.local_theta:g}"
        )
    return None


FAMILY: Final = Family(
    model_type="olmo3",
    describe=describe,
    llama_cpp=Architecture(
        name="olmo2",
        keys=BASE_KEYS | {"rope.freq_base_swa", "attention.sliding_window", "attention.sliding_window_pattern"},
        head="must",
        square=True,
        check=_one_theta,
    ),
)
