"""The decoders of ERNIE 4.5 and Helium, which are Llama's architecture with rotary pairs of adjacent dimensions.

llama.cpp's architectures rotate adjacent dimensions as well, so the rows of queries and keys keep their order.
llama.cpp's converter does not know Helium; as Helium computes what llama.cpp's architecture "llama" computes, the GGUF
has that architecture.

Source: transformers' Ernie4_5Config, HeliumConfig and their ForCausalLM classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION_BIASES, MLP_BIASES
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, LLAMA_KEYS, MOST_LINEARS, QKV, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role


def describe_ernie(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of an ernie4_5 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    biases = ATTENTION_BIASES | MLP_BIASES if Settings(config).flag("use_bias", False) else frozenset()
    config = {"head_dim": 128, **config}
    return _adjacent(like_llama("ernie4_5", config, max_positions=131072, theta=5e5, eps=1e-5, biases=biases))


def describe_helium(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a helium config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    biases: frozenset[Role] = (QKV - {Role.QKV}) if settings.flag("attention_bias", False) else frozenset()
    biases |= MLP_BIASES if settings.flag("mlp_bias", False) else frozenset()
    config = {"head_dim": 128, **config}
    return _adjacent(like_llama("helium", config, max_positions=4096, theta=1e5, eps=1e-8, biases=biases))


def _adjacent(spec: DecoderSpec) -> DecoderSpec:
    assert spec.rope is not None
    return replace(spec, rope=replace(spec.rope, interleaved=True))


FAMILIES: Final = (
    Family(
        model_type="ernie4_5",
        describe=describe_ernie,
        llama_cpp=Architecture(
            name="ernie4_5",
            keys=BASE_KEYS,
            head_length="always",
            interleaved=True,
            biases=QKV | {Role.ATTN_OUT},
            copies_prefix_space=True,
        ),
    ),
    Family(
        model_type="helium",
        describe=describe_helium,
        llama_cpp=Architecture(
            name="llama",
            keys=LLAMA_KEYS,
            head_length="always",
            interleaved=True,
            biases=MOST_LINEARS,
            copies_prefix_space=True,
        ),
    ),
)
