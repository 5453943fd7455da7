"""Pack the Q, K and V matrices into one matrix if ONNX Runtime's attention operator accepts the packed product.

A single matrix product with the packed matrix needs fewer nodes and thread synchronisations than three products. If the
weights are quantised, the packed product also quantises the activations once instead of three times. With packed Q, K
and V, SmolLM2 in int8 decodes a token in 4 to 8 % less time on one core. Packing does not make prompt processing
faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from exporter.families.spec import DecoderSpec, Role, Slot
from exporter.formats.onnx.weights.precision import Precision

#: Packed roles, in the order of packing.
_PACKED: Final = (Role.Q, Role.K, Role.V)

#: Names of the stored tensors that give an initialiser, and the initialiser's slot.
Group = tuple[Sequence[str], Slot]


def reads_packed(spec: DecoderSpec, layer: int) -> bool:
    """Whether GroupQueryAttention can read the layer's Q, K and V products directly, without nodes in between."""
    rope, attention = spec.rope, spec.attention
    plain = attention.qk_norm is None and attention.log_growth is None and attention.clip is None
    return plain and (rope is None or layer in rope.skipped or rotates_inside(spec, layer))


def rotates_inside(spec: DecoderSpec, layer: int) -> bool:
    """Whether GroupQueryAttention can apply the layer's rotary embedding, or separate nodes are needed."""
    rope = spec.rope
    if rope is None or layer in rope.skipped or rope.interleaved or rope.dims != spec.attention.head_dim:
        return False
    if spec.attention.norm_after_rope:
        return False
    long = rope.scaling is not None and rope.scaling.get("rope_type") == "longrope"
    return not long and (rope.local_theta is None or layer not in spec.attention.windowed)


def packed(groups: Sequence[Group], spec: DecoderSpec, precision: Precision) -> list[Group]:
    """Replace the Q, K and V initialisers by packed QKV initialisers in every layer that allows packing.

    A layer keeps separate initialisers if Q, K and V differ in transposition or quantisation, or if only some of Q, K
    and V have a bias.
    """
    by_slot: dict[tuple[Role, int | None, str], Group] = {
        (slot.role, slot.layer, slot.parameter): (names, slot) for names, slot in groups
    }
    out: list[Group] = []
    for names, slot in groups:
        if slot.role not in _PACKED or not _can_pack(by_slot, spec, precision, slot):
            out.append((names, slot))
        elif slot.role is Role.Q:
            parts = [by_slot[role, slot.layer, slot.parameter][0] for role in _PACKED]
            out.append(([name for part in parts for name in part], replace(slot, role=Role.QKV)))
    return out


def _can_pack(
    by_slot: Mapping[tuple[Role, int | None, str], Group], spec: DecoderSpec, precision: Precision, slot: Slot
) -> bool:
    layer = slot.layer
    if layer is None or not reads_packed(spec, layer) or spec.transposed & {*_PACKED}:
        return False
    biases = {(role, layer, "bias") in by_slot for role in _PACKED}
    weight = replace(slot, parameter="weight")
    roles = (*_PACKED, Role.QKV)
    forms = {precision.form(replace(weight, role=role), (spec.hidden, spec.hidden), spec.layers) for role in roles}
    return len(biases) == len(forms) == 1
