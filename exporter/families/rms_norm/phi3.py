"""The decoder of Phi-3 and Phi-4-mini, with a joint QKV matrix, a joint gate and up matrix, and longrope scaling.

Source: transformers' Phi3Config and Phi3ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.errors import BadInput
from exporter.families.building_blocks import PRE_NORMS, rope, rope_table, window
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import PLAIN_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role, Rope

_LAYER: Final = PRE_NORMS | {
    "self_attn.qkv_proj": Role.QKV,
    "self_attn.o_proj": Role.ATTN_OUT,
    "mlp.gate_up_proj": Role.GATE_UP,
    "mlp.down_proj": Role.DOWN,
}
#: Names of longrope in older configs. Source: Phi3Config.convert_rope_params_to_dict.
_LONG: Final = ("su", "yarn", "longrope")


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a phi3 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    table = dict(rope_table(config))
    if table["rope_type"] in _LONG:
        table["rope_type"] = "longrope"
    plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    spec = like_llama("phi3", plain | {"partial_rotary_factor": 1}, max_positions=4096, layer=_LAYER)
    size, which = window("phi3", settings, spec.layers)
    scaled = plain | {"rope_parameters": table}
    rotary = rope("phi3", scaled, spec.attention.head_dim, rope_types=("longrope",), partial=1.0)
    _check_factors(rotary)
    return replace(
        spec,
        norm=replace(spec.norm, eps=settings.number("rms_norm_eps", 1e-5)),
        rope=replace(rotary, original_positions=settings.integer("original_max_position_embeddings", 4096)),
        attention=replace(spec.attention, qkv="blocks", window=size, windowed=which),
    )


def _check_factors(rotary: Rope) -> None:
    for key in ("short_factor", "long_factor") if rotary.scaling else ():
        factors = (rotary.scaling or {}).get(key)
        if (
            not isinstance(factors, list)
            or len(factors) != rotary.dims // 2
            or not all(type(factor) in (int, float) and factor > 0 for factor in factors)
        ):
            raise BadInput(f"config.json: {key}: expected {rotary.dims // 2} numbers above 0, found {factors!r:.80}")


FAMILY: Final = Family(
    model_type="phi3",
    describe=describe,
    llama_cpp=Architecture(
        name="phi3",
        keys=PLAIN_KEYS | {"rope.dimension_count", "rope.scaling.original_context_length", "attention.sliding_window"},
        head_length="never",
        scalings=frozenset({"longrope"}),
        square=True,
    ),
)
