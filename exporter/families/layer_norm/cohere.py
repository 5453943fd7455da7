"""The decoder of Cohere's Command R.

In Command R, attention and MLP read the output of the same norm, which has no bias. The rotary embedding of Command R
pairs adjacent dimensions, and the logits are scaled.

Source: transformers' CohereConfig and CohereForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION, ATTENTION_BIASES, GATED_MLP, QK_NORMS, rope
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import PLAIN_KEYS, Architecture
from exporter.families.rms_norm.llama import like_llama
from exporter.families.spec import DecoderSpec, Norm, Role

_LAYER: Final = {"input_layernorm": Role.ATTN_NORM} | ATTENTION | GATED_MLP


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a cohere config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    normed = settings.flag("use_qk_norm", False)
    spec = like_llama(
        "cohere",
        config,
        max_positions=8192,
        layer=_LAYER | (QK_NORMS if normed else {}),
        biases=ATTENTION_BIASES if settings.flag("attention_bias", False) else frozenset(),
    )
    return replace(
        spec,
        # Command R was trained with a much longer context than max_position_embeddings.
        max_positions=settings.integer("model_max_length", spec.max_positions),
        norm=Norm(type="layer", eps=settings.number("layer_norm_eps", 1e-5)),
        rope=replace(rope("cohere", config, spec.attention.head_dim, theta=500000.0), interleaved=True),
        attention=replace(spec.attention, qk_norm="each" if normed else None),
        parallel=True,
        logit_scale=settings.number("logit_scale", 0.0625),
    )


def _command_r(spec: DecoderSpec) -> str | None:
    """Return the reason why llama.cpp would load the model wrongly, or None if llama.cpp loads the model correctly.

    llama.cpp expects query and key norms in a model with 64 or more layers (Command R+), and in no other model.
    """
    if (spec.attention.qk_norm is not None) != (spec.layers >= 64):
        wanted = "true" if spec.layers >= 64 else "false"
        return f"use_qk_norm: expected {wanted}, which llama.cpp assumes for a model with {spec.layers} layers"
    return None


FAMILY: Final = Family(
    model_type="cohere",
    describe=describe,
    llama_cpp=Architecture(
        name="command-r",
        keys=PLAIN_KEYS | {"logit_scale", "rope.scaling.type"},
        interleaved=True,
        head="never",
        scalings=frozenset(),
        square=True,
        check=_command_r,
    ),
)
