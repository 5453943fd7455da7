"""Which stored tensor goes where in a decoder: the same for every format that is built from a description."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from exporter.errors import TensorMismatch
from exporter.families.spec import DecoderSpec, Role, Slot
from exporter.merge.model import MergedModel
from exporter.tensors import TensorSpec

#: Buffers that old checkpoints carry and every runtime computes for itself.
_BUFFERS: Final = re.compile(r"\.(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)$")


def assign(
    model: MergedModel, specs: Mapping[str, TensorSpec], spec: DecoderSpec
) -> tuple[dict[str, Slot], dict[str, str]]:
    """(stored tensor → slot, stored tensor → why it is dropped), both in the order of shard, then name.

    specs: ``model.specs``. Tensors in neither are left to the ledger. Raises TensorMismatch for a shape that is not
    what the config says, or a weight that is missing.
    """
    shapes = _shapes(spec)
    tie = model.tie
    kept: dict[str, Slot] = {}
    dropped: dict[str, str] = {}
    for name in sorted(specs, key=lambda name: (model.where(name).name, name)):
        if _BUFFERS.search(name):
            dropped[name] = "computed by the runtime"
        elif tie.tied and name == tie.head:
            dropped[name] = "tied: same as the embedding"
        elif slot := spec.slots.get(name):
            want = shapes[slot.role] if slot.part == "weight" else shapes[slot.role][:1]
            if specs[name].shape != want:
                where = model.where(name)
                raise TensorMismatch(where, name, expected=f"shape {want} by config.json", found=specs[name].shape)
            kept[name] = slot
    for name, slot in spec.slots.items():
        if slot.part == "weight" and name not in kept and not (slot.role is Role.HEAD and tie.tied):
            raise TensorMismatch(
                model.path, name, expected=f"shape {shapes[slot.role]} by config.json", found="no tensor"
            )
    return kept, dropped


def _shapes(spec: DecoderSpec) -> dict[Role, tuple[int, ...]]:
    attention, hidden, inner = spec.attention, spec.hidden, spec.mlp.inner
    q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    return {
        Role.EMBED: (spec.vocab, hidden),
        Role.HEAD: (spec.vocab, hidden),
        Role.FINAL_NORM: (hidden,),
        Role.ATTN_NORM: (hidden,),
        Role.MLP_NORM: (hidden,),
        Role.Q: (q, hidden),
        Role.K: (kv, hidden),
        Role.V: (kv, hidden),
        Role.ATTN_OUT: (hidden, q),
        Role.GATE: (inner, hidden),
        Role.UP: (inner, hidden),
        Role.DOWN: (hidden, inner),
    }
