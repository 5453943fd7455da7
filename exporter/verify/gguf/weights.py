"""Checks of a GGUF's other tensors, those beside the vocabulary, against base and adapters: every element of them.

What is not quantised, or by rules that give the same bytes here, must have the very bytes; other quantisers may be off
by what their type explains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from exporter.sources.gguf.split_files import GgufModel
from exporter.tensors import BLOCK_BYTES, FLOATS, Array, cast
from exporter.verify.expect.reference import Reference
from exporter.verify.expect.tensors import Expected
from exporter.verify.gguf.hyperparameters import hyperparameters
from exporter.verify.gguf.layout import VOCABULARY, Arrange, arrangement, generated, map_tensors
from exporter.verify.report import Check, Skip
from exporter.verify.stored.artifact import decode, encode
from exporter.verify.tolerances import MERGED_ULPS
from exporter.verify.values.computed import ulps
from exporter.verify.values.quantised_rows import QuantisedRows, sum_fault


def check_weights(parts: GgufModel, reference: Reference) -> Iterator[Check | Skip]:
    """Yield the checks. Memory: a block of rows; of a tensor in another order, or with updates, all of it."""
    config, arch = reference.checkpoint.text_config, str(parts.metadata.get("general.architecture"))
    layers = hyperparameters(config).get("block_count")
    try:
        wanted, strangers = map_tensors(reference.checkpoint.tensors, arch, layers if isinstance(layers, int) else 1)
    except KeyError:
        yield Skip("other tensors", f"how llama.cpp orders the tensors of architecture {arch!r:.60} is not known here")
        return
    made = generated(config)
    yield _check_names(parts, set(wanted) | set(made))
    if strangers:
        yield Skip("other tensors", f"{len(strangers)} have no place in a GGUF, such as {strangers[0]}")
    found = _Found()
    for name in parts.tensors:
        if name in VOCABULARY:
            continue
        if name in made:
            found.compare(parts, name, made[name][None], "F32")
        elif name in wanted:
            sources = [reference.tensors[stored] for stored in wanted[name]]
            _compare(parts, name, sources, arrangement(arch, name, config), found)
    yield from found.checks()


def _check_names(parts: GgufModel, wanted: set[str]) -> Check:
    """The head is the tie check's affair."""
    wrong = sorted((parts.tensors.keys() ^ wanted) - set(VOCABULARY))
    detail = f"{len(parts.tensors)} tensors, named as the base's"
    if wrong:
        detail = f"{wrong[0]}: {'not of the base' if wrong[0] in parts.tensors else 'expected, found none'}"
    return Check(name="tensor names", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _compare(parts: GgufModel, name: str, sources: Sequence[Expected], arrange: Arrange | None, found: _Found) -> None:
    """``sources``: the tensor, or the members of a stack, one after another."""
    tensor = parts.tensors[name]
    rows, width = tensor.n_rows // len(sources), tensor.shape[-1]
    for number, want in enumerate(sources):
        spec = want.source.spec
        if math.prod(spec.shape) != rows * width:
            found.wrong.append(f"{name}: expected the elements of {spec.shape}, found {tensor.shape}")
            return
        whole = arrange is not None or want.computed or len(spec.shape) == 1
        step = spec.n_rows if whole else max(1, BLOCK_BYTES // max(1, spec.row_nbytes))
        first = number * rows
        for start in range(0, spec.n_rows, step):
            stop = min(start + step, spec.n_rows)
            value = want.values(range(spec.n_rows)) if want.computed else want.source.rows(start, stop)
            value = (arrange(value) if arrange else value).reshape(-1, width)
            if want.computed:
                base = want.base.rows(start, stop)
                base = (arrange(base) if arrange else base).reshape(-1, width)
                found.compare_sum(parts, name, value, base, want.base.spec.dtype, first)
            else:
                found.compare(parts, name, value, want.base.spec.dtype, first=first)
            first += len(value)


class _Found:
    """What the comparisons of all tensors come to."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.skipped: list[str] = []
        self.count = 0
        self.rows: dict[str, QuantisedRows] = {}

    def compare(self, parts: GgufModel, name: str, value: Array, stored: str, *, first: int = 0) -> None:
        """Compare rows from ``first`` on with ``value`` (n, width), whose base is ``stored`` so."""
        kind, raw = self._read(parts, name, first, len(value))
        if kind not in FLOATS:
            self.rows.setdefault(name, QuantisedRows(kind)).add(raw, value, stored, first)
            return
        wrong = np.all([(one != raw).any(axis=1) for one in _floats(value, kind, stored)], axis=0)
        if wrong.any():
            self.wrong.append(f"{name}: row {first + int(np.flatnonzero(wrong)[0])} is not the base's")

    def compare_sum(self, parts: GgufModel, name: str, value: Array, base: Array, stored: str, first: int) -> None:
        """The same where ``value`` is ``base`` plus updates."""
        kind, raw = self._read(parts, name, first, len(value))
        if kind in FLOATS:
            wrong = ~(ulps(decode(raw, kind), value, kind) <= MERGED_ULPS).all(axis=1)
            verdict = f"row {first + int(np.flatnonzero(wrong)[0])} is not base plus updates" if wrong.any() else ""
        else:
            judged = sum_fault(raw, value, base.astype(np.float64), kind, stored)
            self.skipped += [name] if judged is None else []
            verdict = judged or ""
        self.wrong += [f"{name}: {verdict}"] if verdict else []

    def _read(self, parts: GgufModel, name: str, first: int, count: int) -> tuple[str, Array]:
        self.count += 1
        return parts.tensors[name].type, parts.holder(name).rows(name, first, first + count)

    def checks(self) -> Iterator[Check | Skip]:
        """The verdict on all of them."""
        for name, rows in self.rows.items():
            self.wrong += [f"{name}: {reason}" for reason in rows.faults()]
            self.skipped += [name] if rows.unknown else []
        detail = f"{self.count} blocks of rows as base and adapters give them" if not self.wrong else self.wrong[0]
        limit, value = 0.0, float(len(self.wrong))
        yield Check(name="other tensors", passed=not self.wrong, value=value, limit=limit, detail=detail)
        if self.skipped:
            reason = f"{len(self.skipped)} quantised tensors, such as {self.skipped[0]}, are judged by their logits"
            yield Skip("other tensors", reason)


def _floats(value: Array, kind: str, stored: str) -> Iterator[Array]:
    yield encode(value, kind)
    if stored in FLOATS:
        yield encode(cast(value, stored), kind)
