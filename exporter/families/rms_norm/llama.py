"""The decoder of Llama 2 and 3.x, SmolLM2, and other models with Llama's architecture.

Source: transformers' LlamaConfig and LlamaForCausalLM.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from exporter.families.building_blocks import ATTENTION_BIASES, LAYER, MLP_BIASES, OUTSIDE, heads, naming_scheme, rope
from exporter.families.config import Activation, Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import LLAMA_KEYS, MOST_LINEARS, Architecture
from exporter.families.spec import Attention, DecoderSpec, Mlp, Norm, Role


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a llama config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    return like_llama("llama", config, optional=ATTENTION_BIASES | MLP_BIASES)


def like_llama(
    family: str,
    config: Mapping[str, Any],
    *,
    max_positions: int = 2048,
    theta: float = 10000.0,
    eps: float = 1e-6,
    activation: Activation = "silu",
    layer: Mapping[str, Role] = LAYER,
    outside: Mapping[str, Role] = OUTSIDE,
    biases: Collection[Role] = (),
    optional: Collection[Role] = (),
) -> DecoderSpec:
    """Return a DecoderSpec with Llama's architecture.

    max_positions, theta, eps: the default values in the family's config class. activation: the default activation of
    the MLP, which is the only supported one. The MLP has a gate if ``layer`` contains one.
    """
    settings = Settings(config)
    count, kv_heads, head_dim = heads(settings)
    layers = settings.layers()
    return DecoderSpec(
        family=family,
        vocab=settings.integer("vocab_size"),
        hidden=settings.integer("hidden_size"),
        layers=layers,
        max_positions=settings.integer("max_position_embeddings", max_positions),
        norm=Norm(type="rms", eps=settings.number("rms_norm_eps", eps)),
        rope=rope(family, config, head_dim, theta=theta),
        attention=Attention(heads=count, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5),
        mlp=Mlp(
            inner=settings.integer("intermediate_size"),
            activation=settings.activation(family, "hidden_act", activation, {activation}),
            gated=not {Role.GATE, Role.GATE_UP}.isdisjoint(layer.values()),
        ),
        naming_schemes=(naming_scheme(layers, layer, outside=outside, biases=biases, optional=optional),),
    )


FAMILY: Final = Family(
    model_type="llama",
    describe=describe,
    llama_cpp=Architecture(
        name="llama",
        keys=LLAMA_KEYS,
        head_length="always",
        interleaved=True,
        biases=MOST_LINEARS,
        scalings=frozenset({"linear", "llama3", "yarn"}),
        copies_prefix_space=True,
    ),
)
