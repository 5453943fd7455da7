"""The llama family: Llama 2 and 3.x, SmolLM2, and the many models that share their shape.

Source: transformers' LlamaConfig and LlamaForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible
from exporter.families.config import Settings
from exporter.families.spec import Attention, DecoderSpec, Mlp, Role, Rope, Slot

_OUTSIDE: Final = {
    "model.embed_tokens.weight": Role.EMBED,
    "model.norm.weight": Role.FINAL_NORM,
    "lm_head.weight": Role.HEAD,
}
_LAYER: Final = {
    "input_layernorm.weight": Role.ATTN_NORM,
    "self_attn.q_proj": Role.Q,
    "self_attn.k_proj": Role.K,
    "self_attn.v_proj": Role.V,
    "self_attn.o_proj": Role.ATTN_OUT,
    "post_attention_layernorm.weight": Role.MLP_NORM,
    "mlp.gate_proj": Role.GATE,
    "mlp.up_proj": Role.UP,
    "mlp.down_proj": Role.DOWN,
}
#: Far above any model: a broken config must not fill the memory with names.
_MAX_LAYERS: Final = 10_000


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a llama config. Raises BadInput for a missing value, NotExpressible for a variant that is not described."""
    settings = Settings(config)
    hidden, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    layers = settings.integer("num_hidden_layers")
    head_dim = settings.integer("head_dim", hidden // heads)
    kv_heads = settings.integer("num_key_value_heads", heads)
    if layers > _MAX_LAYERS:
        raise BadInput(f"config.json: num_hidden_layers: expected at most {_MAX_LAYERS}, found {layers}")
    if heads % kv_heads:
        raise BadInput(f"config.json: num_key_value_heads: expected a divisor of {heads}, found {kv_heads}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise NotExpressible("llama", f"hidden_act {config['hidden_act']!r} is not described by this family")
    return DecoderSpec(
        family="llama",
        vocab=settings.integer("vocab_size"),
        hidden=hidden,
        layers=layers,
        max_positions=settings.integer("max_position_embeddings", 2048),
        rms_eps=settings.number("rms_norm_eps", 1e-6),
        rope=_rope(config, head_dim),
        attention=Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5),
        mlp=Mlp(inner=settings.integer("intermediate_size"), activation="silu"),
        slots=_slots(layers),
    )


def _rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Transformers 5 writes ``rope_parameters``; before, ``rope_theta`` and ``rope_scaling`` stood side by side."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise BadInput(f"config.json: rope_parameters: expected a table, found {table!r:.80}")
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise NotExpressible("llama", f"rope type {kind!r:.80} is not described by this family")
    if table.get("partial_rotary_factor", 1) != 1:
        raise NotExpressible("llama", "partial_rotary_factor is not described by this family")
    theta = Settings({"rope_theta": table.get("rope_theta", config.get("rope_theta", 10000.0))}).number("rope_theta")
    return Rope(dims=head_dim, theta=theta, scaling=None if kind == "default" else {**table, "rope_type": kind})


def _slots(layers: int) -> dict[str, Slot]:
    slots = {name: Slot(role, None, "weight") for name, role in _OUTSIDE.items()}
    for layer in range(layers):
        for name, role in _LAYER.items():
            if name.endswith(".weight"):
                slots[f"model.layers.{layer}.{name}"] = Slot(role, layer, "weight")
            else:
                slots[f"model.layers.{layer}.{name}.weight"] = Slot(role, layer, "weight")
                slots[f"model.layers.{layer}.{name}.bias"] = Slot(role, layer, "bias")
    return slots
