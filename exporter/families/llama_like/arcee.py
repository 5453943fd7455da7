"""The decoder of Arcee's AFM, which is Llama's architecture with an MLP without a gate and with the square of ReLU.

llama.cpp stores the model under an architecture of its own, with queries and keys in the order of Llama's.

Source: transformers' ArceeConfig and ArceeForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, ATTENTION_BIASES, PRE_NORMS
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import LLAMA_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Role

_LAYER: Final = PRE_NORMS | ATTENTION | {"mlp.up_proj": Role.UP, "mlp.down_proj": Role.DOWN}


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of an arcee config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    biases: frozenset[Role] = ATTENTION_BIASES if settings.flag("attention_bias", False) else frozenset()
    biases |= {Role.UP, Role.DOWN} if settings.flag("mlp_bias", False) else frozenset()
    return like_llama("arcee", config, max_positions=4096, eps=1e-5, activation="relu2", layer=_LAYER, biases=biases)


FAMILY: Final = Family(
    model_type="arcee",
    describe=describe,
    llama_cpp=Architecture(
        name="arcee",
        keys=LLAMA_KEYS,
        head_length="always",
        interleaved=True,
        scalings=frozenset({"linear", "llama3", "yarn"}),
        copies_prefix_space=True,
    ),
)
