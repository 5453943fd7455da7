"""The text decoders of Gemma 1, 2 and 3.

In Gemma, the weights of the norms have an offset of 1, the embedding is scaled, and the MLP's gate is a GELU. Starting
with Gemma 2, layers with a sliding window alternate with full-attention layers.

Source: transformers' GemmaConfig, Gemma2Config, Gemma3TextConfig and their ForCausalLM classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible
from exporter.families.building_blocks import (
    ATTENTION,
    ATTENTION_BIASES,
    GATED_MLP,
    LAYER,
    QK_NORMS,
    heads,
    inside_multimodal,
    naming_scheme,
    rope,
    text_config,
    window,
)
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import BASE_KEYS, PLAIN_KEYS, Architecture, Check
from exporter.families.spec import Attention, DecoderSpec, Mlp, Norm, Role

_FOUR_NORMS: Final = {
    "input_layernorm": Role.ATTN_NORM,
    "post_attention_layernorm": Role.ATTN_POST_NORM,
    "pre_feedforward_layernorm": Role.MLP_NORM,
    "post_feedforward_layernorm": Role.MLP_POST_NORM,
}


def describe_gemma(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a gemma config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    return _gemma("gemma", config, layer=LAYER, activation="hidden_act", scalar=None)


def describe_gemma2(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a gemma2 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    spec = _gemma("gemma2", config, layer=_FOUR_NORMS | ATTENTION | GATED_MLP)
    size, which = window("gemma2", settings, spec.layers, default=4096, only=range(0, spec.layers, 2))
    softcap = _softcap(settings, "attn_logit_softcapping", 50.0)
    return replace(
        spec,
        attention=replace(spec.attention, window=size, windowed=which, softcap=softcap),
        logit_softcap=_softcap(settings, "final_logit_softcapping", 30.0),
    )


def describe_gemma3(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a gemma3 text model.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    if config.get("use_bidirectional_attention"):
        raise NotExpressible("gemma3_text", "use_bidirectional_attention is not supported for this model family")
    flat, local_theta = _flat_rope(config)
    spec = _gemma("gemma3_text", flat, layer=_FOUR_NORMS | ATTENTION | QK_NORMS | GATED_MLP, theta=1e6)
    period = settings.integer("sliding_window_pattern", settings.integer("_sliding_window_pattern", 6))
    local = [layer for layer in range(spec.layers) if (layer + 1) % period]
    size, which = window("gemma3_text", settings, spec.layers, default=4096, only=local)
    assert spec.rope is not None
    return replace(
        spec,
        max_positions=settings.integer("max_position_embeddings", 131072),
        rope=replace(spec.rope, local_theta=local_theta),
        attention=replace(
            spec.attention,
            qk_norm="head",
            window=size,
            windowed=which,
            softcap=_softcap(settings, "attn_logit_softcapping", None),
        ),
        logit_softcap=_softcap(settings, "final_logit_softcapping", None),
    )


def describe_gemma3_multimodal(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the text decoder of a multimodal gemma3 config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    return inside_multimodal(describe_gemma3({"vocab_size": 262208} | text_config(config)))


def _flat_rope(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
    """Return (config with the rope parameters of the full-attention layers, theta of the sliding-window layers)."""
    table = config.get("rope_parameters") or {}
    if not isinstance(table, Mapping) or not all(
        isinstance(table.get(layer_type, {}), Mapping) for layer_type in ("full_attention", "sliding_attention")
    ):
        raise BadInput(f"config.json: rope_parameters: expected an object for each layer type, found {table!r:.80}")
    local = table.get("sliding_attention", {})
    if local.get("rope_type", "default") != "default":
        raise NotExpressible(
            "gemma3_text", f"rope type {local['rope_type']!r:.80} in sliding-window layers is not supported"
        )
    theta = local.get("rope_theta", config.get("rope_local_base_freq", 10000.0))
    flat = {key: value for key, value in config.items() if key != "rope_parameters"}
    if "full_attention" in table:
        flat["rope_parameters"] = table["full_attention"]
    return flat, Settings({"rope_local_base_freq": theta}).number("rope_local_base_freq")


def _softcap(settings: Settings, key: str, default: float | None) -> float | None:
    return settings.number(key) if settings.table.get(key, default) is not None and key in settings.table else default


def _gemma(
    family: str,
    config: Mapping[str, Any],
    *,
    layer: Mapping[str, Role],
    activation: str = "hidden_activation",
    scalar: int | None = 256,
    theta: float = 10000.0,
) -> DecoderSpec:
    """Return a DecoderSpec with the features that Gemma 1, 2 and 3 have in common.

    scalar: the default of ``query_pre_attn_scalar``, or None if the default is the head width.
    """
    settings = Settings(config)
    count, kv_heads, head_dim = heads(settings, head_dim=256)
    layers, hidden = settings.layers(), settings.integer("hidden_size")
    base = head_dim if scalar is None else settings.number("query_pre_attn_scalar", scalar)
    biases = ATTENTION_BIASES if settings.flag("attention_bias", False) else frozenset()
    return DecoderSpec(
        family=family,
        vocab=settings.integer("vocab_size"),
        hidden=hidden,
        layers=layers,
        max_positions=settings.integer("max_position_embeddings", 8192),
        norm=Norm(type="rms", eps=settings.number("rms_norm_eps", 1e-6), offset=1.0),
        rope=rope(family, config, head_dim, rope_types=("linear",), theta=theta),
        attention=Attention(heads=count, kv_heads=kv_heads, head_dim=head_dim, scale=base**-0.5),
        mlp=Mlp(
            inner=settings.integer("intermediate_size"),
            activation=settings.activation(family, activation, "gelu_pytorch_tanh", ("gelu", "gelu_tanh")),
        ),
        naming_schemes=(naming_scheme(layers, layer, biases=biases),),
        embed_scale=hidden**0.5,
    )


_GEMMA_KEYS: Final = PLAIN_KEYS - {"rope.freq_base"}


def _fixed_sizes(large: int | None, period: int | None) -> Check:
    """Return a function that compares a decoder with the values that llama.cpp hard-codes for Gemma.

    large: number of layers of the 27B model, for which llama.cpp uses a different attention scale. period: llama.cpp
    uses full attention in every ``period``-th layer, and a sliding window in the other layers.
    """

    def check(spec: DecoderSpec) -> str | None:
        attention = spec.attention
        base = spec.hidden // attention.heads if spec.layers == large else attention.head_dim
        if abs(attention.scale * base**0.5 - 1) > 1e-6:
            scale = f"{base**-0.5:.6g}"
            return f"attention scale: expected {scale}, which llama.cpp hard-codes, found {attention.scale:.6g}"
        fixed = frozenset(layer for layer in range(spec.layers) if (layer + 1) % period) if period else frozenset[int]()
        if attention.windowed != fixed and (attention.window is not None or period == 2):
            windowed = sorted(attention.windowed)
            return f"sliding-window layers: expected {sorted(fixed)}, which llama.cpp hard-codes, found {windowed}"
        return None

    return check


def _fixed_gemma3(spec: DecoderSpec) -> str | None:
    if spec.attention.softcap is not None:
        return "llama.cpp does not support attn_logit_softcapping for this architecture"
    return _fixed_sizes(62, 6)(spec)


_GEMMA3: Final = Architecture(
    name="gemma3",
    keys=BASE_KEYS | {"rope.freq_base_swa", "attention.sliding_window", "final_logit_softcapping"},
    head_length="always",
    scalings=frozenset({"linear"}),
    check=_fixed_gemma3,
)


FAMILIES: Final = (
    Family(
        model_type="gemma",
        describe=describe_gemma,
        llama_cpp=Architecture(
            name="gemma",
            keys=_GEMMA_KEYS,
            head_length="always",
            head="never",
            scalings=frozenset(),
            check=_fixed_sizes(None, None),
        ),
    ),
    Family(
        model_type="gemma2",
        describe=describe_gemma2,
        llama_cpp=Architecture(
            name="gemma2",
            keys=_GEMMA_KEYS | {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"},
            head_length="always",
            head="never",
            scalings=frozenset(),
            check=_fixed_sizes(46, 2),
        ),
    ),
    Family(model_type="gemma3_text", describe=describe_gemma3, llama_cpp=_GEMMA3),
    # An ONNX folder contains the multimodal config, so clients would look for the vision tower.
    Family(model_type="gemma3", describe=describe_gemma3_multimodal, llama_cpp=_GEMMA3, targets=("gguf",)),
)
