"""Adapters as a GGUF LoRA: token rows as an exact pair of low rank, ordinary LoRA updates as they are.

A row that is set is an update of rank one: a one-hot column times (new row minus old row). llama.cpp reads a pair on
``token_embd.weight`` turned around: ``lora_a`` is looked up by token, ``lora_b`` multiplies. Source: llama.cpp's
llama-adapter.cpp and build_inp_embd; names and keys as its convert_lora_to_gguf.py writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from exporter.errors import NotExpressible
from exporter.families import describe
from exporter.families.spec import DecoderSpec, Role, Slot
from exporter.formats.gguf import metadata, writer
from exporter.formats.gguf.architectures import Architecture, architecture
from exporter.formats.gguf.names import tensor_name
from exporter.formats.gguf.quantisation.tensors import encode
from exporter.formats.gguf.writer import ALIGNMENT, TensorEntry
from exporter.formats.slots import assign
from exporter.formats.views import Interleaved, Regrouped
from exporter.io.output import OutputFile
from exporter.merge.changes import Change
from exporter.merge.plan import MergePlan
from exporter.progress import Progress, silent
from exporter.sources.peft.edits import LowRank, TokenRows
from exporter.tensors import Array, ByteRange, TensorSpec, cast, read, same_values

_EXPERTS: Final = frozenset({Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN})
#: Rows of a one-hot matrix are made in blocks of about this many bytes.
_BLOCK_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Pair:
    """W += scale * left @ right, left: (out, r), right: (r, in), float32.

    The columns of ``left`` from ``dense.shape[1]`` on are one-hot: column j is 1 in row ``ones[j]``.
    """

    dense: Array
    ones: tuple[int, ...]
    right: Array
    one: float

    @property
    def rank(self) -> int:
        """The r of the pair."""
        return len(self.right)

    @property
    def n_rows(self) -> int:
        """Rows of the matrix."""
        return len(self.dense)

    def left(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the left factor."""
        out = np.zeros((stop - start, self.rank), np.float32)
        held = self.dense.shape[1]
        out[:, :held] = self.dense[start:stop]
        for number, row in enumerate(self.ones):
            if start <= row < stop:
                out[row - start, held + number] = self.one
        return out


@dataclass(frozen=True)
class LoraLayout:
    """The file to be. pairs: llama.cpp's name of each tensor that an adapter changes → its pair."""

    header: bytes
    entries: Sequence[TensorEntry]
    pairs: Mapping[str, Pair]
    dtype: str
    nbytes: int


def plan_gguf_lora(merge: MergePlan, dtype: str = "F32") -> LoraLayout:
    """Lay out the adapters of ``merge`` as one LoRA in ``dtype``; reads their factors and the base's old rows.

    Raises NotExpressible for what a LoRA of llama.cpp cannot say: rows of a tied base, new tokens, whole tensors,
    DoRA, biases, experts.
    """
    if not merge.adapters:
        raise NotExpressible("gguf-lora", "it is made of an adapter, and there is none", instead="--to gguf")
    merge = replace(merge, sources={name: _without_copy(merge, *source) for name, source in merge.sources.items()})
    _refuse_tied(merge)
    model = merge.model()
    spec = describe(model.config, "gguf")
    row = architecture(spec, tied=model.tie.tied)
    kept, _ = assign(model, model.specs, spec)
    alpha = _alpha(merge)
    changed = {name: source for name, source in merge.sources.items() if source[1] != Change()}
    if homeless := changed.keys() - kept.keys():
        raise NotExpressible("gguf-lora", f"an adapter changes {min(homeless)}, which has no place in the file")
    pairs = {
        tensor_name(slot): _pair(merge, name, *changed[name], slot, spec, row, alpha)
        for name, slot in kept.items()
        if name in changed
    }
    entries = []
    for name, pair in pairs.items():
        left, right = (pair.n_rows, pair.rank), pair.right.shape
        turned = name == "token_embd.weight"
        entries.append(TensorEntry(f"{name}.lora_a", dtype, left if turned else right))
        entries.append(TensorEntry(f"{name}.lora_b", dtype, right[::-1] if turned else left))
    keys = [
        writer.text("general.architecture", row.name),
        writer.text("general.type", "adapter"),
        writer.text("adapter.type", "lora"),
        writer.text("general.name", merge.adapters[0].path.resolve().name),
        writer.text("general.base_model.0.name", metadata.model_name(merge.checkpoint.path)),
        writer.u32("general.base_model.count", 1),
        writer.f32("adapter.lora.alpha", alpha),
        writer.u32("general.quantization_version", metadata.QUANTIZATION_VERSION),
        *metadata.provenance_keys(model.provenance),
    ]
    header, nbytes = writer.header(keys, entries)
    return LoraLayout(header, entries, pairs, dtype, nbytes)


def write_gguf_lora(layout: LoraLayout, path: Path, progress: Progress = silent) -> None:
    """Write ``layout`` to ``path``, a new file. Memory: the factors, and a block of a one-hot matrix."""
    with OutputFile(path, progress, nbytes=layout.nbytes) as out:
        out.write(layout.header)
        for name, pair in layout.pairs.items():
            turned = name == "token_embd.weight"
            parts = (_left(pair), iter([pair.right.T])) if turned else (iter([pair.right]), _left(pair))
            for part in parts:
                for block in part:
                    out.write(encode(block, layout.dtype))
                out.pad_to(ALIGNMENT)
        if out.nbytes != layout.nbytes:
            raise AssertionError(f"{path}: {layout.nbytes} bytes were promised, {out.nbytes} came")


def _left(pair: Pair) -> Iterator[Array]:
    step = max(1, _BLOCK_BYTES // (4 * pair.rank))
    for start in range(0, pair.n_rows, step):
        yield pair.left(start, min(start + step, pair.n_rows))


def _without_copy(merge: MergePlan, stored: str, change: Change) -> tuple[str, Change]:
    """A change that sets a tensor to what the base has there, as PEFT saves embeddings beside updates of them, is none.

    Only a whole matrix of the base is read.
    """
    base, whole = merge.checkpoint.tensors[stored], change.replaced
    if whole and whole.tensor.spec.shape == base.spec.shape and same_values(whole.tensor, base):
        return stored, replace(change, replaced=None)
    return stored, change


def _refuse_tied(merge: MergePlan) -> None:
    tie = merge.checkpoint.tie
    names = (tie.embedding, *([merge.tie.head] if merge.tie.head else []))
    changed = [name for name in names if name in merge.sources and merge.sources[name][1] != Change()]
    if tie.tied and changed:
        folders = " ".join(str(adapter.path) for adapter in merge.adapters)
        raise NotExpressible(
            f"gguf-lora: {merge.checkpoint.path}: {tie.embedding}",
            "the head is tied to the embedding, and llama.cpp looks up one pair for both, which ends the process",
            instead=f"ttexport patch BASE.gguf {folders} -o OUT.gguf puts the rows into a GGUF",
        )
    grown = merge.vocab - merge.checkpoint.tensors[tie.embedding].spec.n_rows
    if grown > 0:
        raise NotExpressible(
            f"gguf-lora: {merge.checkpoint.path}",
            f"the adapters bring {grown} new rows of the vocabulary, and a LoRA adds none",
            instead="ttexport patch BASE.gguf ADAPTER -o OUT.gguf adds them to a GGUF",
        )


def _alpha(merge: MergePlan) -> float:
    """The one alpha of the file, by which llama.cpp scales a pair of rank r: alpha / r; 0 for no scaling.

    That of the updates where they agree, so that their factors stay as they are.
    """
    found = {part.scaling * part.rank for _, change in merge.sources.values() for part in change.updates}
    alpha = found.pop() if len(found) == 1 else 0.0
    return alpha if float(np.float32(alpha)) == alpha else 0.0


def _pair(
    merge: MergePlan,
    name: str,
    stored: str,
    change: Change,
    slot: Slot,
    spec: DecoderSpec,
    row: Architecture,
    alpha: float,
) -> Pair:
    base = merge.checkpoint.tensors[stored]
    _refuse(name, base.place.path, change, slot)
    factors = [_factors(part, slot, spec) for part in change.updates]
    ids = tuple(token_id for part in change.rows for token_id in part.token_ids)
    rank = sum(right.shape[0] for _, right in factors) + len(ids)
    if ids and alpha:
        rank = _exact_rank(alpha, rank)
    undo = rank / alpha if alpha else 1.0  # llama.cpp multiplies by alpha / rank
    lefts = [left * np.float32(part.scaling * undo) for part, (left, _) in zip(change.updates, factors, strict=True)]
    rights = [right for _, right in factors]
    for part in change.rows:
        rights.append(_deltas(part, base.rows, base.spec.n_rows))
    n_out, width = base.spec.shape if slot.role not in spec.transposed else base.spec.shape[::-1]
    missing = rank - sum(len(right) for right in rights)
    rights.append(np.zeros((missing, width), np.float32))
    dense = np.concatenate([*lefts, np.zeros((n_out, 0), np.float32)], axis=1)
    return Pair(_ordered(dense, slot, spec, row), ids, np.concatenate(rights), undo)


def _refuse(name: str, path: Path, change: Change, slot: Slot) -> None:
    reason = None
    if change.replaced:
        reason = "an adapter brings the whole tensor, which is no update of low rank"
    elif change.biases or slot.parameter == "bias":
        reason = "an adapter changes a bias, for which it has no place"
    elif any(part.magnitude for part in change.updates):
        reason = "DoRA scales the base's own weights as well"
    elif slot.role in _EXPERTS or slot.member is not None:
        reason = "updates of single experts are not written by this version"
    if reason:
        raise NotExpressible(f"gguf-lora: {path}: {name}", reason, instead="--to gguf merges it")


def _factors(part: LowRank, slot: Slot, spec: DecoderSpec) -> tuple[Array, Array]:
    """(left, right) in the orientation of llama.cpp's matrix, (out, in)."""
    down, up = cast(read(part.down), "F32"), cast(read(part.up), "F32")
    if part.target_type == "embedding":
        return down.T, up.T
    if part.target_type == "parameter" and slot.role in spec.transposed:
        return down.T, up.T
    return up, down


def _deltas(part: TokenRows, old: object, n_rows: int) -> Array:
    assert callable(old)
    assert part.token_ids[-1] < n_rows, "new rows were refused before"
    before = np.concatenate([old(token_id, token_id + 1) for token_id in part.token_ids])
    return (part.rows.astype(np.float64) - before.astype(np.float64)).astype(np.float32)


def _exact_rank(alpha: float, rank: int) -> int:
    """A rank of at least ``rank`` for which rank / alpha is a power of two, if alpha is an integer: no bit is lost."""
    if not alpha.is_integer():
        return rank
    exact = abs(int(alpha))
    while exact % 2 == 0:
        exact //= 2
    while exact < rank:
        exact *= 2
    return exact


def _ordered(left: Array, slot: Slot, spec: DecoderSpec, row: Architecture) -> Array:
    """``left`` with its rows in the order that llama.cpp has for the matrix."""
    attention = spec.attention
    heads = {Role.Q: attention.heads, Role.K: attention.kv_heads}.get(slot.role)
    if left.shape[1] == 0:
        return left
    if slot.role is Role.QKV and attention.qkv == "heads":
        return read(Regrouped(_Held(left), attention.heads))
    if heads and row.interleaved and spec.rope and not spec.rope.interleaved:
        return read(Interleaved(_Held(left), heads))
    return left


@dataclass(frozen=True)
class _Held:
    """A matrix in memory, as views want it."""

    value: Array

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec("lora", "F32", self.value.shape)

    def rows(self, start: int, stop: int) -> Array:
        return self.value[start:stop]

    def segments(self) -> Iterator[ByteRange | Array]:
        yield self.value
