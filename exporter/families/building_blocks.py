"""What several families read from a config in the same way: heads, rotary embedding, windows, tensor names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible
from exporter.families.config import Settings
from exporter.families.spec import Role, Rope, Slot

#: Attention biases of models in which one flag gives all four projections a bias.
ATTENTION_BIASES: Final = frozenset({Role.Q, Role.K, Role.V, Role.ATTN_OUT})
MLP_BIASES: Final = frozenset({Role.GATE, Role.UP, Role.DOWN})

#: Names of a llama and all who follow it, outside the layers and inside one.
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


def heads(settings: Settings, *, head_dim: int | None = None) -> tuple[int, int, int]:
    """(query heads, key heads, width of a head); the last from the config, else ``head_dim``, else hidden / heads.

    Raises BadInput for numbers that do not go together.
    """
    count = settings.integer("num_attention_heads")
    width = settings.integer("head_dim", head_dim or settings.integer("hidden_size") // count)
    kv_heads = settings.integer("num_key_value_heads", count)
    if count % kv_heads:
        raise BadInput(f"config.json: num_key_value_heads: expected a divisor of {count}, found {kv_heads}")
    return count, kv_heads, width


def rope_table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Transformers 5 writes ``rope_parameters``; before, ``rope_theta`` and ``rope_scaling`` stood side by side.

    The table has ``rope_type``, whatever the spelling was.
    """
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise BadInput(f"config.json: rope_parameters: expected a table, found {table!r:.80}")
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
    """The rotary embedding of a config, ``theta`` and ``partial`` being the family's defaults.

    rope_types: the rope types of the family beside "default". partial None: the family rotates whole heads.
    Raises NotExpressible for another rope type, BadInput for numbers that make no sense.
    """
    table = rope_table(config)
    kind = table["rope_type"]
    if kind not in ("default", *rope_types):
        raise NotExpressible(family, f"rope type {kind!r:.80} is not described by this family")
    values = Settings(
        {"rope_theta": theta, "partial_rotary_factor": 1.0 if partial is None else partial, **config, **table}
    )
    base, factor = values.number("rope_theta"), values.number("partial_rotary_factor")
    dims = int(head_dim * factor)
    if partial is None and factor != 1:
        raise NotExpressible(family, "partial_rotary_factor is not described by this family")
    if dims % 2 or not 0 < dims <= head_dim:
        raise BadInput(f"config.json: rotary dimensions: expected an even number up to {head_dim}, found {dims}")
    if kind == "default":
        return Rope(dims=dims, theta=base)
    known = original_positions(config, table) if kind in ("yarn", "longrope") else None
    return Rope(dims=dims, theta=base, scaling=table, original_positions=known)


def original_positions(config: Mapping[str, Any], table: Mapping[str, Any]) -> int | None:
    """The context before scaling: in the table, else beside it, else the whole context; None if none is there."""
    key = "original_max_position_embeddings"
    known = table.get(key) or config.get(key) or config.get("max_position_embeddings")
    return None if known is None else Settings({key: known}).integer(key)


def windowed(family: str, config: Mapping[str, Any], layers: int, default: Collection[int]) -> frozenset[int]:
    """The layers with a window: ``layer_types`` says which, else ``default``. Raises NotExpressible for other types."""
    types = config.get("layer_types")
    if types is None:
        return frozenset(default)
    if not isinstance(types, list) or len(types) != layers:
        raise BadInput(f"config.json: layer_types: expected a list of {layers}, found {types!r:.80}")
    if odd := {str(kind) for kind in types} - {"full_attention", "sliding_attention"}:
        raise NotExpressible(family, f"layer type {min(odd)!r:.80} is not described by this family")
    return frozenset(layer for layer, kind in enumerate(types) if kind == "sliding_attention")


def window(
    family: str, settings: Settings, layers: int, *, default: int | None = None, only: Collection[int] | None = None
) -> tuple[int | None, frozenset[int]]:
    """(``sliding_window``, the layers that have it): those of ``layer_types``, else ``only``, else all of them."""
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
    """Tensor name → slot from module name → role.

    layer: names inside a layer; ``{}`` stands for the number of the expert or head, of which ``members`` has the
    count. biases: roles with a bias; optional: roles with one where the checkpoint has it.
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
