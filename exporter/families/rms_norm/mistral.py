"""The decoders of Mistral (Llama with a sliding window) and Mixtral (with experts instead of a single MLP).

Source: transformers' MistralConfig, MixtralConfig and their ForCausalLM classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, PRE_NORMS, naming_scheme, window
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import EXPERT_KEYS, LLAMA_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Moe, Role

_EXPERTS: Final = {
    "block_sparse_moe.gate": Role.ROUTER,
    "block_sparse_moe.experts.{}.w1": Role.EXPERT_GATE,
    "block_sparse_moe.experts.{}.w3": Role.EXPERT_UP,
    "block_sparse_moe.experts.{}.w2": Role.EXPERT_DOWN,
}


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a mistral config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    return _windowed(like_llama("mistral", config, max_positions=131072), config, default=4096)


def describe_mixtral(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a mixtral config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    spec = _windowed(like_llama("mixtral", config, max_positions=131072, theta=1e6), config, default=None)
    experts = settings.experts("num_local_experts", "num_experts")
    members = dict.fromkeys((Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN), experts)
    return replace(
        spec,
        norm=replace(spec.norm, eps=settings.number("rms_norm_eps", 1e-5)),
        moe=Moe(
            experts=experts,
            top_k=settings.at_most("num_experts_per_tok", experts),
            inner=spec.mlp.inner,
            normalised=True,
        ),
        naming_schemes=(naming_scheme(spec.layers, PRE_NORMS | ATTENTION | _EXPERTS, members=members),),
    )


def _windowed(spec: DecoderSpec, config: Mapping[str, Any], *, default: int | None) -> DecoderSpec:
    size, which = window(spec.family, Settings(config), spec.layers, default=default)
    return replace(spec, attention=replace(spec.attention, window=size, windowed=which))


FAMILIES: Final = (
    Family(
        model_type="mistral",
        describe=describe,
        llama_cpp=Architecture(
            name="llama",
            keys=LLAMA_KEYS,
            head_length="always",
            interleaved=True,
            scalings=frozenset({"linear", "llama3", "yarn"}),
            copies_prefix_space=True,
        ),
    ),
    Family(
        model_type="mixtral",
        describe=describe_mixtral,
        llama_cpp=Architecture(name="llama", keys=LLAMA_KEYS | EXPERT_KEYS, interleaved=True, copies_prefix_space=True),
    ),
)
