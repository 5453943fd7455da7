"""The decoder of StableLM 2, with layer norms and a partial rotary embedding.

In the 12B model of StableLM 2, attention and MLP share a norm.

Source: transformers' StableLmConfig and StableLmForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, GATED_MLP, PRE_NORMS, naming_scheme, rope
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import PLAIN_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Norm, Role

_QK_NORMS: Final = {
    "self_attn.q_layernorm.norms.{}": Role.Q_NORM,
    "self_attn.k_layernorm.norms.{}": Role.K_NORM,
}
_NORMS: Final = frozenset({Role.FINAL_NORM, Role.ATTN_NORM, Role.MLP_NORM})


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a stablelm config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    spec = like_llama("stablelm", {**config, "partial_rotary_factor": 1, "rope_parameters": None}, max_positions=4096)
    attention = spec.attention
    parallel, normed = settings.flag("use_parallel_residual", False), settings.flag("qk_layernorm", False)
    layer = PRE_NORMS | ATTENTION | GATED_MLP | (_QK_NORMS if normed else {})
    if parallel:
        del layer["post_attention_layernorm"]
    biases = _NORMS | ({Role.Q, Role.K, Role.V} if settings.flag("use_qkv_bias", False) else set())
    members = {Role.Q_NORM: attention.heads, Role.K_NORM: attention.kv_heads}
    return replace(
        spec,
        norm=Norm(type="layer", eps=settings.number("layer_norm_eps", 1e-5)),
        rope=rope("stablelm", config, attention.head_dim, partial=0.25),
        attention=replace(attention, qk_norm="each" if normed else None),
        parallel=parallel,
        naming_schemes=(naming_scheme(spec.layers, layer, biases=biases, members=members),),
    )


FAMILY: Final = Family(
    model_type="stablelm",
    describe=describe,
    llama_cpp=Architecture(
        name="stablelm",
        keys=PLAIN_KEYS - {"rope.freq_base"} | {"rope.dimension_count", "use_parallel_residual"},
        head_length="never",
        head="must",
        scalings=frozenset(),
        square=True,
    ),
)
