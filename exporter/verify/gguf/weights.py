"""Check every element of a GGUF's tensors, except embedding and head, against the base checkpoint and the adapters.

GGUF tensors that are stored as floats must equal the base's tensors byte for byte, or sums of base and updates up to
rounding. If the quantiser that made the GGUF is available to the verification, quantised tensors must equal the
verification's own quantised tensors byte for byte. If the GGUF was made by a different quantiser, the quantisation
error of each row must be within a limit, which depends on the quantisation type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from exporter.sources.gguf.split_files import GgufModel
from exporter.tensors import BLOCK_BYTES, FLOATS, Array, cast
from exporter.verify.expect.expected import Expected
from exporter.verify.expect.reference import Reference
from exporter.verify.gguf.hyperparameters import hyperparameters
from exporter.verify.gguf.layout import VOCABULARY, Arrange, arrangement, generated, map_tensors
from exporter.verify.report import Check, Skip
from exporter.verify.stored.artifact import decode, encode
from exporter.verify.tolerances import MERGED_ULPS
from exporter.verify.values.computed import ulps
from exporter.verify.values.quantised_rows import QuantisedRows, sum_fault


def check_weights(gguf: GgufModel, reference: Reference) -> Iterator[Check | Skip]:
    """Yield the checks of all tensors of a GGUF, except embedding and head.

    Peak memory: one block of rows, or one whole tensor if the tensor has updates or is stored in a different element
    order than in the checkpoint.
    """
    config, arch = reference.checkpoint.text_config, str(gguf.metadata.get("general.architecture"))
    layers = hyperparameters(config).get("block_count")
    try:
        wanted, unknown = map_tensors(reference.checkpoint.tensors, arch, layers if isinstance(layers, int) else 1)
    except KeyError:
        reason = f"the verification does not know llama.cpp's order of tensor elements for architecture {arch!r:.60}"
        yield Skip("other tensors", reason)
        return
    generated_tensors = generated(config)
    yield _check_names(gguf, set(wanted) | set(generated_tensors))
    if unknown:
        yield Skip("other tensors", f"{len(unknown)} base tensors, such as {unknown[0]}, have no matching GGUF tensor")
    comparison = _Comparison()
    for name in gguf.tensors:
        if name in VOCABULARY:
            continue
        if name in generated_tensors:
            comparison.compare(gguf, name, generated_tensors[name][None], "F32")
        elif name in wanted:
            sources = [reference.tensors[stored] for stored in wanted[name]]
            _compare(gguf, name, sources, arrangement(arch, name, config), comparison)
    yield from comparison.checks()


def _check_names(gguf: GgufModel, wanted: set[str]) -> Check:
    """Check that a GGUF contains exactly the tensor names that are expected for the base checkpoint.

    The tensor names of embedding and head depend on tying, and are checked separately.
    """
    wrong = sorted((gguf.tensors.keys() ^ wanted) - set(VOCABULARY))
    detail = f"the names of {len(gguf.tensors)} GGUF tensors match the base"
    if wrong:
        detail = f"{wrong[0]}: {'unexpected GGUF tensor' if wrong[0] in gguf.tensors else 'missing GGUF tensor'}"
    return Check(name="tensor names", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _compare(
    gguf: GgufModel, name: str, sources: Sequence[Expected], arrange: Arrange | None, comparison: _Comparison
) -> None:
    """Compare one GGUF tensor with its expected values, and record the result in ``comparison``.

    sources: the expected values of each checkpoint tensor that is stacked in the GGUF tensor, in order. For a GGUF
    tensor that is not a stack, ``sources`` has one element.
    """
    tensor = gguf.tensors[name]
    rows, width = tensor.n_rows // len(sources), tensor.shape[-1]
    for number, want in enumerate(sources):
        spec = want.source.spec
        if math.prod(spec.shape) != rows * width:
            comparison.wrong.append(
                f"{name}: expected as many elements as in shape {spec.shape}, found shape {tensor.shape}"
            )
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
                comparison.compare_sum(gguf, name, value, base, want.base.spec.dtype, first)
            else:
                comparison.compare(gguf, name, value, want.base.spec.dtype, first=first)
            first += len(value)


class _Comparison:
    """Results of comparing the tensors of a GGUF, one after another, with their expected values."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.skipped: list[str] = []
        self.count = 0
        self.rows: dict[str, QuantisedRows] = {}

    def compare(self, gguf: GgufModel, name: str, value: Array, base_dtype: str, *, first: int = 0) -> None:
        """Compare consecutive rows of a GGUF tensor with ``value``, an array of shape (n, width).

        base_dtype: the dtype of the tensor in the base checkpoint.
        first: the row number of the first compared row.
        """
        storage, raw = self._read(gguf, name, first, len(value))
        if storage not in FLOATS:
            self.rows.setdefault(name, QuantisedRows(storage)).add(raw, value, base_dtype, first)
            return
        wrong = np.all([(encoding != raw).any(axis=1) for encoding in _floats(value, storage, base_dtype)], axis=0)
        if wrong.any():
            self.wrong.append(f"{name}: row {first + int(np.flatnonzero(wrong)[0])} differs from the base")

    def compare_sum(self, gguf: GgufModel, name: str, value: Array, base: Array, base_dtype: str, first: int) -> None:
        """Compare consecutive rows of a GGUF tensor with ``value``, the sum of ``base`` and updates.

        first: the row number of the first compared row.
        """
        storage, raw = self._read(gguf, name, first, len(value))
        if storage in FLOATS:
            wrong = ~(ulps(decode(raw, storage), value, storage) <= MERGED_ULPS).all(axis=1)
            row = first + int(np.flatnonzero(wrong)[0]) if wrong.any() else None
            fault = "" if row is None else f"row {row} differs from base plus adapter updates"
        else:
            known_fault = sum_fault(raw, value, base.astype(np.float64), storage, base_dtype)
            self.skipped += [name] if known_fault is None else []
            fault = known_fault or ""
        self.wrong += [f"{name}: {fault}"] if fault else []

    def _read(self, gguf: GgufModel, name: str, first: int, count: int) -> tuple[str, Array]:
        self.count += 1
        return gguf.tensors[name].type, gguf.holder(name).rows(name, first, first + count)

    def checks(self) -> Iterator[Check | Skip]:
        """Yield one check for all compared tensors, and a Skip if some tensors could not be compared."""
        for name, rows in self.rows.items():
            self.wrong += [f"{name}: {reason}" for reason in rows.faults()]
            self.skipped += [name] if rows.not_made else []
        detail = f"{self.count} blocks of tensor rows match base and adapters" if not self.wrong else self.wrong[0]
        limit, value = 0.0, float(len(self.wrong))
        yield Check(name="other tensors", passed=not self.wrong, value=value, limit=limit, detail=detail)
        if self.skipped:
            reason = (
                f"{len(self.skipped)} quantised tensors, such as {self.skipped[0]}, "
                "can be verified only by comparing the model's logits"
            )
            yield Skip("other tensors", reason)


def _floats(value: Array, storage: str, base_dtype: str) -> Iterator[Array]:
    yield encode(value, storage)
    if base_dtype in FLOATS:
        yield encode(cast(value, base_dtype), storage)
