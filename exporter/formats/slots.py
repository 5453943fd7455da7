"""Determine the role of each checkpoint tensor, such as query projection, for models of the built-in families."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from exporter.errors import TensorMismatch
from exporter.families.spec import DecoderSpec, Role, Slot
from exporter.merge.model import MergedModel
from exporter.tensors import TensorSpec

NORMS: Final = frozenset(role for role in Role if role.name.endswith("NORM"))
EXPERTS: Final = frozenset({Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN})

#: Names of buffers in old checkpoints. Every runtime computes the buffers, so the stored values are dropped.
_BUFFERS: Final = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|(attention|attn)\.masked_bias|attention\.bias)$")


def naming_schemes(spec: DecoderSpec) -> list[Mapping[str, Slot]]:
    """Return all ways in which a checkpoint may name the tensors of the decoder.

    A checkpoint that was saved from the base model (AutoModel) lacks the prefix of the base model's module, such as
    ``model.``. transformers loads such a checkpoint into the model with a head as well.
    """
    schemes = list(spec.naming_schemes)
    for scheme in spec.naming_schemes:
        prefix = next(name for name, slot in scheme.items() if slot.role is Role.EMBED).partition(".")[0] + "."
        schemes.append({name.removeprefix(prefix): slot for name, slot in scheme.items()})
    return schemes


def assign(
    model: MergedModel, specs: Mapping[str, TensorSpec], spec: DecoderSpec
) -> tuple[dict[str, Slot], dict[str, str]]:
    """Assign each checkpoint tensor to a slot of the decoder: a role, such as query projection, and the layer number.

    Returns two dicts, ordered by shard and tensor name. The first dict maps the name of each assigned tensor to the
    tensor's slot. The second dict maps the name of each dropped tensor to the reason for dropping the tensor. specs:
    the value of ``model.specs``, which the caller has already computed. The function ignores unknown tensors; the
    caller's ledger, which records how each tensor is used, raises a LedgerError for an unknown tensor. Raises
    TensorMismatch if a tensor is missing or if its shape contradicts the config.
    """
    # The checkpoint's naming scheme is the scheme with the most tensor names in common with the checkpoint.
    scheme = max(naming_schemes(spec), key=lambda names: len(names.keys() & specs.keys()))
    tie = model.tie
    kept: dict[str, Slot] = {}
    dropped: dict[str, str] = {}
    for name in sorted(specs, key=lambda name: (model.where(name).name, name)):
        if slot := scheme.get(name):
            if tie.tied and name == tie.head:
                dropped[name] = "omitted, because the LM head is tied to the embedding"
                continue
            want = shape(spec, slot)
            if specs[name].shape != want:
                where = model.where(name)
                raise TensorMismatch(
                    where, name, expected=f"shape {want} according to config.json", found=specs[name].shape
                )
            kept[name] = slot
        elif _BUFFERS.search(name):
            dropped[name] = "omitted, because every runtime computes this buffer itself"
        elif name.startswith(spec.foreign_prefixes):
            dropped[name] = "omitted, because the tensor is not part of the text decoder"
    for name, slot in scheme.items():
        if name not in kept and not slot.optional and not (slot.role is Role.HEAD and tie.tied):
            want = shape(spec, slot)
            raise TensorMismatch(model.path, name, expected=f"shape {want} according to config.json", found="no tensor")
    return kept, dropped


def shape(spec: DecoderSpec, slot: Slot) -> tuple[int, ...]:
    """Return the shape that the tensor of ``slot`` has in a checkpoint."""
    role = slot.role
    if role in (Role.Q_NORM, Role.K_NORM):
        return _qk_norm(spec, slot)
    if role in _VECTORS:
        return (spec.hidden,)
    attention, hidden, inner = spec.attention, spec.hidden, spec.mlp.inner
    q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    experts, expert_inner = (spec.moe.experts, spec.moe.inner) if spec.moe else (0, 0)
    want = {
        Role.EMBED: (spec.vocab, hidden),
        Role.HEAD: (spec.vocab, hidden),
        Role.POSITIONS: (spec.max_positions, hidden),
        Role.Q: (q, hidden),
        Role.K: (kv, hidden),
        Role.V: (kv, hidden),
        Role.QKV: (q + 2 * kv, hidden),
        Role.ATTN_OUT: (hidden, q),
        Role.GATE: (inner, hidden),
        Role.UP: (inner, hidden),
        Role.GATE_UP: (2 * inner, hidden),
        Role.DOWN: (hidden, inner),
        Role.ROUTER: (experts, hidden),
        Role.EXPERT_GATE: (expert_inner, hidden),
        Role.EXPERT_UP: (expert_inner, hidden),
        Role.EXPERT_DOWN: (hidden, expert_inner),
    }[role]
    if slot.parameter == "bias":
        return want[:1]
    return want[::-1] if role in spec.transposed else want


_VECTORS: Final = (Role.FINAL_NORM, Role.ATTN_NORM, Role.ATTN_POST_NORM, Role.MLP_NORM, Role.MLP_POST_NORM)


def _qk_norm(spec: DecoderSpec, slot: Slot) -> tuple[int, ...]:
    attention = spec.attention
    heads = attention.heads if slot.role is Role.Q_NORM else attention.kv_heads
    if attention.qk_norm == "all":
        return (heads * attention.head_dim,)
    if attention.qk_norm == "each" and slot.member is None:
        return (heads, attention.head_dim)
    return (attention.head_dim,)
