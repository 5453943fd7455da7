"""The decoder of Nemotron and Minitron, with layer norms whose weights have an offset of 1, and the square of ReLU.

llama.cpp reads the norms with the offset, and needs an untied head.

Source: transformers' NemotronConfig and NemotronForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, ATTENTION_BIASES, PRE_NORMS, rope
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import PLAIN_KEYS, QKV, SEQUENTIAL, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Norm, Role

_LAYER: Final = PRE_NORMS | ATTENTION | {"mlp.up_proj": Role.UP, "mlp.down_proj": Role.DOWN}
_NORMS: Final = frozenset({Role.FINAL_NORM, Role.ATTN_NORM, Role.MLP_NORM})


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a nemotron config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    biases = _NORMS
    biases |= ATTENTION_BIASES if settings.flag("attention_bias", False) else frozenset()
    biases |= {Role.UP, Role.DOWN} if settings.flag("mlp_bias", False) else frozenset()
    plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "partial_rotary_factor")}
    spec = like_llama(
        "nemotron",
        {**plain, "rope_scaling": None},
        max_positions=4096,
        activation="relu2",
        layer=_LAYER,
        biases=biases,
    )
    return replace(
        spec,
        norm=Norm(type="layer", eps=settings.number("norm_eps", 1e-5), offset=1.0),
        rope=rope("nemotron", config, spec.attention.head_dim, rope_types=(), partial=0.5),
    )


FAMILY: Final = Family(
    model_type="nemotron",
    describe=describe,
    llama_cpp=Architecture(
        name="nemotron",
        keys=PLAIN_KEYS
        | {"vocab_size", "rope.dimension_count", "rope.scaling.type", "attention.layer_norm_rms_epsilon"},
        head_length="always",
        head="must",
        biases=QKV | SEQUENTIAL,
        scalings=frozenset(),
        square=True,
    ),
)
