"""The decoders of Qwen 2 and 2.5, Qwen 3, and Qwen 3 with experts.

Qwen 2 and 2.5 have biases on the query, key and value projections. Qwen 3 has norms on queries and keys.

Source: transformers' Qwen2Config, Qwen3Config, Qwen3MoeConfig and their ForCausalLM classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.families.building_blocks import (
    ATTENTION,
    ATTENTION_BIASES,
    LAYER,
    PRE_NORMS,
    QK_NORMS,
    naming_scheme,
    window,
)
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, EXPERT_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Moe, Role

_POSITIONS: Final = 32768
_EXPERTS: Final = {
    "mlp.gate": Role.ROUTER,
    "mlp.experts.{}.gate_proj": Role.EXPERT_GATE,
    "mlp.experts.{}.up_proj": Role.EXPERT_UP,
    "mlp.experts.{}.down_proj": Role.EXPERT_DOWN,
}


def describe_qwen2(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a qwen2 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    biases = (Role.Q, Role.K, Role.V)
    return _windowed(like_llama("qwen2", config, max_positions=_POSITIONS, biases=biases), config)


def describe_qwen3(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a qwen3 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    return _windowed(_qwen3("qwen3", {"head_dim": 128, **config}), config)


def describe_qwen3_moe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a qwen3_moe config.

    Raises BadInput for a missing config value, and NotExpressible for a model in which some layers have no experts.
    """
    settings = Settings(config)
    if config.get("mlp_only_layers") or settings.integer("decoder_sparse_step", 1) != 1:
        raise NotExpressible(
            "qwen3_moe", "layers without experts (mlp_only_layers, decoder_sparse_step) are not supported"
        )
    spec = _qwen3("qwen3_moe", config)
    experts = settings.experts("num_local_experts", "num_experts")
    members = dict.fromkeys((Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN), experts)
    size, which = (
        window(spec.family, settings, spec.layers) if settings.flag("use_sliding_window", False) else (None, ())
    )
    return replace(
        spec,
        attention=replace(spec.attention, window=size, windowed=frozenset(which)),
        moe=Moe(
            experts=experts,
            top_k=settings.at_most("num_experts_per_tok", experts),
            inner=settings.integer("moe_intermediate_size", 768),
            normalised=settings.flag("norm_topk_prob", False),
        ),
        naming_schemes=(
            naming_scheme(
                spec.layers,
                PRE_NORMS | ATTENTION | QK_NORMS | _EXPERTS,
                biases=_attention_biases(settings),
                members=members,
            ),
        ),
    )


def _qwen3(family: str, config: Mapping[str, Any]) -> DecoderSpec:
    biases = _attention_biases(Settings(config))
    spec = like_llama(family, config, max_positions=_POSITIONS, layer=LAYER | QK_NORMS, biases=biases)
    return replace(spec, attention=replace(spec.attention, qk_norm="head"))


def _attention_biases(settings: Settings) -> frozenset[Role]:
    return ATTENTION_BIASES if settings.flag("attention_bias", False) else frozenset()


def _windowed(spec: DecoderSpec, config: Mapping[str, Any]) -> DecoderSpec:
    """Apply the sliding window to the layers from ``max_window_layers`` on, if ``use_sliding_window`` is true."""
    settings = Settings(config)
    if not settings.flag("use_sliding_window", False):
        return spec
    first = settings.integer("max_window_layers", 28)
    size, which = window(spec.family, settings, spec.layers, default=4096, only=range(first, spec.layers))
    return replace(spec, attention=replace(spec.attention, window=size, windowed=which))


def _qwen3_moe(spec: DecoderSpec) -> str | None:
    if spec.moe and not spec.moe.normalised:
        return "norm_topk_prob: expected true, because llama.cpp always normalises the expert weights, found false"
    return None


FAMILIES: Final = (
    Family(
        model_type="qwen2", describe=describe_qwen2, llama_cpp=Architecture(name="qwen2", keys=BASE_KEYS, square=True)
    ),
    Family(
        model_type="qwen3",
        describe=describe_qwen3,
        llama_cpp=Architecture(name="qwen3", keys=BASE_KEYS, head_length="always"),
    ),
    Family(
        model_type="qwen3_moe",
        describe=describe_qwen3_moe,
        llama_cpp=Architecture(
            name="qwen3moe", keys=BASE_KEYS | EXPERT_KEYS | {"expert_feed_forward_length"}, check=_qwen3_moe
        ),
    ),
)
