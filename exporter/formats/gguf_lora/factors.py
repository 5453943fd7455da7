"""Write adapters as a GGUF LoRA. Trained token rows are converted exactly to low-rank factors.

Replacing one row of a matrix is an update of rank one: a one-hot column times the difference of new and old row.
llama.cpp reads the LoRA pair of ``token_embd.weight`` transposed: each token selects a row of ``lora_a``, which is then
multiplied by ``lora_b``.
Sources: llama-adapter.cpp and build_inp_embd in llama.cpp for the computation; llama.cpp's convert_lora_to_gguf.py for
the names of tensors and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from exporter.errors import NotExpressible
from exporter.families import describe
from exporter.families.llama_cpp import Architecture
from exporter.families.spec import DecoderSpec, Slot
from exporter.formats.gguf import metadata, writer
from exporter.formats.gguf.architectures import architecture
from exporter.formats.gguf.names import tensor_name
from exporter.formats.gguf.plan import row_order
from exporter.formats.gguf.quantisation.tensors import encode
from exporter.formats.gguf.writer import ALIGNMENT, TensorEntry
from exporter.formats.slots import EXPERTS, assign
from exporter.io.output import OutputFile
from exporter.merge.changes import Change
from exporter.merge.plan import MergePlan
from exporter.progress import Progress, silent
from exporter.sources.peft.edits import LowRank, TokenRows
from exporter.tensors import Array, ByteRange, LazyTensor, TensorSpec, cast, read, same_values

#: llama.cpp reads the factor pair of the token embedding transposed.
_EMBEDDING: Final = "token_embd.weight"
#: Approximate size of a block of rows of a one-hot matrix, in bytes.
_BLOCK_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class FactorPair:
    """A low-rank update W += scale * left @ right, with the float32 factors left (out, r) and right (r, in).

    The array ``dense`` contains the first columns of the factor ``left``. The remaining columns of ``left`` are
    one-hot: one-hot column j is ``hot_value`` in row ``hot_rows[j]``, and zero in all other rows.
    """

    dense: Array
    hot_rows: tuple[int, ...]
    right: Array
    hot_value: float

    @property
    def rank(self) -> int:
        """The rank r of the low-rank update."""
        return len(self.right)

    @property
    def n_rows(self) -> int:
        """Number of rows of ``left``, which is also the number of rows of the updated matrix."""
        return len(self.dense)

    def left(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the left factor."""
        out = np.zeros((stop - start, self.rank), np.float32)
        n_dense = self.dense.shape[1]
        out[:, :n_dense] = self.dense[start:stop]
        for number, row in enumerate(self.hot_rows):
            if start <= row < stop:
                out[row - start, n_dense + number] = self.hot_value
        return out


@dataclass(frozen=True)
class LoraLayout:
    """The planned GGUF LoRA. pairs: maps llama.cpp's name of each changed tensor to the factor pair of its update."""

    header: bytes
    entries: Sequence[TensorEntry]
    pairs: Mapping[str, FactorPair]
    dtype: str
    nbytes: int


def plan_gguf_lora(merge: MergePlan, dtype: str = "F32") -> LoraLayout:
    """Plan a single GGUF LoRA in ``dtype`` that combines all adapters of ``merge``.

    The function reads the low-rank factors of the adapters, and the rows of the base model's embedding and LM head that
    the adapters change. Raises NotExpressible for changes that a GGUF LoRA cannot represent: changed rows of an
    embedding that is tied to the LM head, new tokens, replacements of whole tensors, DoRA, changes of biases, and
    changes of experts.
    """
    if not merge.adapters:
        raise NotExpressible(
            "gguf-lora",
            "a GGUF LoRA can be written only with an adapter, but no adapter was given",
            instead="use --to gguf to export the model",
        )
    merge = replace(merge, sources={name: _without_copy(merge, *source) for name, source in merge.sources.items()})
    _refuse_tied(merge)
    model = merge.model()
    spec = describe(model.config, "gguf")
    row = architecture(spec, tied=model.tie.tied)
    kept, _ = assign(model, model.specs, spec)
    alpha = _alpha(merge)
    changed = {name: source for name, source in merge.sources.items() if source[1] != Change()}
    if unplaced := changed.keys() - kept.keys():
        raise NotExpressible(
            "gguf-lora", f"an adapter changes {min(unplaced)}, but a GGUF of this model does not contain this tensor"
        )
    pairs = {
        tensor_name(slot, row): _pair(merge, name, *changed[name], slot, spec, row, alpha)
        for name, slot in kept.items()
        if name in changed
    }
    entries = []
    for name, pair in pairs.items():
        left, right = (pair.n_rows, pair.rank), pair.right.shape
        transposed = name == _EMBEDDING
        entries.append(TensorEntry(f"{name}.lora_a", dtype, left if transposed else right))
        entries.append(TensorEntry(f"{name}.lora_b", dtype, right[::-1] if transposed else left))
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
    """Write the GGUF LoRA ``layout`` to the new file ``path``.

    Peak memory: the size of the LoRA factors plus one block of a one-hot matrix.
    """
    with OutputFile(path, progress, nbytes=layout.nbytes) as out:
        out.write(layout.header)
        for name, pair in layout.pairs.items():
            transposed = name == _EMBEDDING
            factors = (_left(pair), iter([pair.right.T])) if transposed else (iter([pair.right]), _left(pair))
            for factor in factors:
                for block in factor:
                    out.write(encode(block, layout.dtype))
                out.pad_to(ALIGNMENT)
        if out.nbytes != layout.nbytes:
            raise AssertionError(f"{path}: expected {layout.nbytes} bytes, wrote {out.nbytes}")


def _left(pair: FactorPair) -> Iterator[Array]:
    step = max(1, _BLOCK_BYTES // (4 * pair.rank))
    for start in range(0, pair.n_rows, step):
        yield pair.left(start, min(start + step, pair.n_rows))


def _without_copy(merge: MergePlan, stored: str, change: Change) -> tuple[str, Change]:
    """If an adapter replaces a whole tensor by a copy of the base's tensor, drop the replacement.

    PEFT can save the whole embedding in addition to trained token rows, so the embedding in an adapter may equal the
    base's embedding. The base's tensor is read only if the adapter replaces the tensor.
    """
    base, replacement = merge.checkpoint.tensors[stored], change.replaced
    if replacement and replacement.tensor.spec.shape == base.spec.shape and same_values(replacement.tensor, base):
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
            "llama.cpp aborts on a LoRA pair for an embedding that is tied to the LM head, as in this model",
            instead=f"use ttexport patch BASE.gguf {folders} -o OUT.gguf to write the token rows into a GGUF",
        )
    grown = merge.vocab - merge.checkpoint.tensors[tie.embedding].spec.n_rows
    if grown > 0:
        raise NotExpressible(
            f"gguf-lora: {merge.checkpoint.path}",
            f"the adapters add {grown} token rows to the embedding, but a GGUF LoRA cannot add rows",
            instead="use ttexport patch BASE.gguf ADAPTER -o OUT.gguf to add the token rows to a GGUF",
        )


def _alpha(merge: MergePlan) -> float:
    """Choose the LoRA alpha to write to the GGUF LoRA.

    llama.cpp scales a LoRA pair of rank r by alpha / r, and an alpha of 0 means no scaling. If all LoRA updates have
    the same alpha, this alpha is chosen, so that the factors can be stored unchanged.
    """
    alphas = {update.scaling * update.rank for _, change in merge.sources.values() for update in change.updates}
    alpha = alphas.pop() if len(alphas) == 1 else 0.0
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
) -> FactorPair:
    base = merge.checkpoint.tensors[stored]
    _refuse(name, base.place.path, change, slot)
    factors = [_factors(update, slot, spec) for update in change.updates]
    ids = tuple(token_id for rows in change.rows for token_id in rows.token_ids)
    rank = sum(right.shape[0] for _, right in factors) + len(ids)
    if ids and alpha:
        rank = _exact_rank(alpha, rank)
    undo = rank / alpha if alpha else 1.0  # llama.cpp multiplies by alpha / rank
    scalings = [update.scaling * undo for update in change.updates]
    lefts = [left * np.float32(scaling) for scaling, (left, _) in zip(scalings, factors, strict=True)]
    rights = [right for _, right in factors]
    for rows in change.rows:
        rights.append(_deltas(rows, base))
    n_out, width = base.spec.shape if slot.role not in spec.transposed else base.spec.shape[::-1]
    missing = rank - sum(len(right) for right in rights)
    rights.append(np.zeros((missing, width), np.float32))
    dense = np.concatenate([*lefts, np.zeros((n_out, 0), np.float32)], axis=1)
    return FactorPair(read(row_order(_InMemory(dense), slot, spec, row)[0]), ids, np.concatenate(rights), undo)


def _refuse(name: str, path: Path, change: Change, slot: Slot) -> None:
    reason = None
    if change.replaced:
        reason = "an adapter replaces the whole tensor, but a LoRA file can contain only low-rank updates"
    elif change.biases or slot.parameter == "bias":
        reason = "an adapter changes a bias, but a LoRA file cannot contain biases"
    elif any(update.magnitude for update in change.updates):
        reason = "a DoRA adapter also rescales the base weights, but a LoRA file can contain only low-rank updates"
    elif slot.role in EXPERTS or slot.member is not None:
        reason = "this version of ttexport cannot write LoRA updates of single experts"
    if reason:
        raise NotExpressible(
            f"gguf-lora: {path}: {name}", reason, instead="use --to gguf to merge the adapter into the model"
        )


def _factors(update: LowRank, slot: Slot, spec: DecoderSpec) -> tuple[Array, Array]:
    """Return the LoRA factors left (out, rank) and right (rank, in) of an update, in the orientation of llama.cpp."""
    down, up = cast(read(update.down), "F32"), cast(read(update.up), "F32")
    if update.target_type == "embedding" or (update.target_type == "parameter" and slot.role in spec.transposed):
        return down.T, up.T
    return up, down


def _deltas(new: TokenRows, base: LazyTensor) -> Array:
    """Return the trained token rows minus the base's rows, rounded once to float32, as an array (rows, hidden)."""
    assert new.token_ids[-1] < base.spec.n_rows, "expected ids of the base model's tokens, found ids of new tokens"
    old = np.concatenate([base.rows(token_id, token_id + 1) for token_id in new.token_ids])
    return (new.rows.astype(np.float64) - old.astype(np.float64)).astype(np.float32)


def _exact_rank(alpha: float, rank: int) -> int:
    """Return a number r >= ``rank`` such that r / alpha is a power of two, so that scaling by alpha / r is exact.

    If alpha is not an integer, the function returns ``rank`` unchanged.
    """
    if not alpha.is_integer():
        return rank
    exact = abs(int(alpha))
    while exact % 2 == 0:
        exact //= 2
    while exact < rank:
        exact *= 2
    return exact


@dataclass(frozen=True)
class _InMemory:
    """A lazy tensor whose rows are in memory."""

    value: Array

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec("lora", "F32", self.value.shape)

    def rows(self, start: int, stop: int) -> Array:
        return self.value[start:stop]

    def segments(self) -> Iterator[ByteRange | Array]:
        yield self.value
