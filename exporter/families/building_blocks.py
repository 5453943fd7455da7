"""Functions and tables that several model families use: attention heads, rotary embeddings, windows, tensor names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible
from exporter.families.config import Settings
from exporter.families.spec import DecoderSpec, Role, Rope, Slot

#: Attention biases of models in which a single flag gives all four projections a bias.
ATTENTION_BIASES: Final = frozenset({Role.Q, Role.K, Role.V, Role.ATTN_OUT})
MLP_BIASES: Final = frozenset({Role.GATE, Role.UP, Role.DOWN})

#: Module names of Llama and of models with Llama's layout, outside the layers and inside a layer.
OUTSIDE: Final = {"model.embed_tokens": Role.EMBED, "model.norm": Role.FINAL_NORM, "lm_head": Role.HEAD}
ATTENTION: Final = {
    "self_attn.q_proj": Role.Q,
    "self_attn.k_proj": Role.K,
    "self_attn.v_proj": Role.V,
    "self_attn.o_proj": Role.ATTN_OUT,
}
GATED_MLP: Final = {"mlp.gate_proj": Role.GATE, "mlp.up_proj": Role.UP, "mlp.down_proj": Role.DOWN}
QK_NORMS: Final = {"self_attn.q_norm": Role.Q_NORM, "self_attn.k_norm": Role.K_NORM}
PRE_NORMS: Final = {"input_layernorm": Role.ATTN_NORM, "post_attention_layernorm": Role.MLP_NORM}
LAYER: Final = PRE_NORMS | ATTENTION | GATED_MLP

#: Prefixes of the vision tower and the projector, in checkpoints and in current transformers classes.
_VISION: Final = tuple(
    f"{outer}{module}." for outer in ("", "model.") for module in ("vision_tower", "multi_modal_projector")
)


def heads(settings: Settings, *, head_dim: int | None = None) -> tuple[int, int, int]:
    """Read (number of query heads, number of key heads, width of a head) from a config.

    head_dim: the head width to use if the config gives no width; None means hidden size / number of query heads.
    Raises BadInput if the number of query heads is not a multiple of the number of key heads.
    """
    count = settings.integer("num_attention_heads")
    width = settings.integer("head_dim", head_dim or settings.integer("hidden_size") // count)
    kv_heads = settings.integer("num_key_value_heads", count)
    if count % kv_heads:
        raise BadInput(
            f"config.json: num_key_value_heads: expected a divisor of num_attention_heads ({count}), found {kv_heads}"
        )
    return count, kv_heads, width


def rope_table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rope parameters of a config as a table, which always has the key ``rope_type``.

    The rope parameters are read from ``rope_parameters`` (transformers 5) or from ``rope_scaling`` (older versions).
    Raises BadInput if the rope parameters are not a JSON object.
    """
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise BadInput(f"config.json: rope_parameters: expected an object, found {table!r:.80}")
    return {**table, "rope_type": table.get("rope_type", table.get("type", "default"))}


def rope(
    family: str,
    config: Mapping[str, Any],
    head_dim: int,
    *,
    rope_types: Collection[str] = ("linear", "llama3", "yarn"),
    theta: float = 10000.0,
    partial: float | None = None,
) -> Rope:
    """Read the rotary embedding of a config.

    rope_types: the rope types that the family supports in addition to "default". theta, partial: the family's defaults
    for theta and for the partial rotary factor. If ``partial`` is None, models of the family always rotate all
    dimensions of a head. Raises NotExpressible for a rope type that the family does not support, and BadInput for
    invalid numbers.
    """
    table = rope_table(config)
    rope_type = table["rope_type"]
    if rope_type not in ("default", *rope_types):
        raise NotExpressible(family, f"rope type {rope_type!r:.80} is not supported for this model family")
    values = Settings(
        {"rope_theta": theta, "partial_rotary_factor": 1.0 if partial is None else partial, **config, **table}
    )
    base, factor = values.number("rope_theta"), values.number("partial_rotary_factor")
    dims = int(head_dim * factor)
    if partial is None and factor != 1:
        raise NotExpressible(family, "partial_rotary_factor is not supported for this model family")
    if dims % 2 or not 0 < dims <= head_dim:
        raise BadInput(f"config.json: rotary dimensions: expected an even number up to {head_dim}, found {dims}")
    if rope_type == "default":
        return Rope(dims=dims, theta=base)
    original = original_positions(config, table) if rope_type in ("yarn", "longrope") else None
    return Rope(dims=dims, theta=base, scaling=table, original_positions=original)


def original_positions(config: Mapping[str, Any], table: Mapping[str, Any]) -> int | None:
    """Return the context length before rope scaling, or None if the config gives no context length.

    The result is ``original_max_position_embeddings``, from the rope parameters in ``table`` or else from the config.
    If ``original_max_position_embeddings`` is missing, the result is the config's ``max_position_embeddings``.
    """
    key = "original_max_position_embeddings"
    value = table.get(key) or config.get(key) or config.get("max_position_embeddings")
    return None if value is None else Settings({key: value}).integer(key)


def windowed(family: str, config: Mapping[str, Any], layers: int, default: Collection[int]) -> frozenset[int]:
    """Return the numbers of the sliding-window layers according to ``layer_types`` in the config.

    If the config has no ``layer_types``, return ``default``. Raises NotExpressible for unknown types in
    ``layer_types``.
    """
    types = config.get("layer_types")
    if types is None:
        return frozenset(default)
    if not isinstance(types, list) or len(types) != layers:
        raise BadInput(f"config.json: layer_types: expected a list of {layers} layer types, found {types!r:.80}")
    if unknown := {str(layer_type) for layer_type in types} - {"full_attention", "sliding_attention"}:
        raise NotExpressible(family, f"layer type {min(unknown)!r:.80} is not supported for this model family")
    return frozenset(layer for layer, layer_type in enumerate(types) if layer_type == "sliding_attention")


def window(
    family: str, settings: Settings, layers: int, *, default: int | None = None, only: Collection[int] | None = None
) -> tuple[int | None, frozenset[int]]:
    """Return (size of the sliding window, numbers of the layers with a sliding window).

    The layers with a sliding window are read from ``layer_types`` if the config has that key. If the config has no
    ``layer_types``, the layers in ``only`` have a sliding window; ``only=None`` means all layers.
    """
    size = settings.table.get("sliding_window", default)
    if size is None:
        return None, frozenset()
    which = windowed(family, settings.table, layers, range(layers) if only is None else only)
    return (settings.integer("sliding_window", default), which) if which else (None, which)


def naming_scheme(
    layers: int,
    layer: Mapping[str, Role],
    *,
    outside: Mapping[str, Role] = OUTSIDE,
    prefix: str = "model.layers.",
    biases: Collection[Role] = (),
    optional: Collection[Role] = (),
    members: Mapping[Role, int] | None = None,
) -> dict[str, Slot]:
    """Expand a table of module names and their roles into a map of each tensor name to its ``Slot`` (role and layer).

    layer: maps module names inside a layer to roles; ``{}`` in a module name is replaced by the number of an expert or
    head. members: the number of experts or heads, for each role with a tensor per expert or head. biases: the roles
    with a bias. optional: the roles that have a bias in some checkpoints only.
    """
    out: dict[str, Slot] = {}

    def put(name: str, role: Role, number: int | None, member: int | None = None) -> None:
        out[f"{name}.weight"] = Slot(role, number, "weight", member)
        if role in biases or role in optional:
            out[f"{name}.bias"] = Slot(role, number, "bias", member, role not in biases)

    for name, role in outside.items():
        put(name, role, None)
    for number in range(layers):
        for name, role in layer.items():
            if "{}" in name:
                for member in range((members or {})[role]):
                    put(f"{prefix}{number}.{name.format(member)}", role, number, member)
            else:
                put(f"{prefix}{number}.{name}", role, number)
    return out


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text model inside a multimodal model. Raises BadInput if there is none."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise BadInput(f"config.json: text_config: expected an object, found {text!r:.80}")
    return dict(text)


def inside_multimodal(spec: DecoderSpec) -> DecoderSpec:
    """Return the description of a text model with the tensor names that the text model has in a multimodal model."""

    def named(inner: str, head: str) -> dict[str, Slot]:
        return {
            (f"{head}{name}" if slot.role is Role.HEAD else f"{inner}{name.removeprefix('model.')}"): slot
            for name, slot in spec.naming_schemes[0].items()
        }

    forms = (named("language_model.model.", "language_model."), named("model.language_model.", ""))
    return replace(spec, naming_schemes=forms, foreign_prefixes=_VISION)
