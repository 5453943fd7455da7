"""Check a patched GGUF file against the base file, without using the code that patches GGUF files.

The base file is read before the patch, because an in-place patch overwrites the base file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.hf.safetensors import read_into
from exporter.sources.hf.tie import HEADS
from exporter.sources.peft.adapter import Adapter
from exporter.tensors import Array, cast
from exporter.verify.patched.files import PROVENANCE
from exporter.verify.patched.untouched import (
    Digests,
    all_rows,
    check_untouched,
    describe_range,
    differing,
    digests,
    sampled_rows,
)
from exporter.verify.report import Check
from exporter.verify.stored.artifact import encode
from exporter.verify.values.computed import sample

_EMBEDDING: Final = "token_embd.weight"
_HEAD: Final = "output.weight"
_TOKENS: Final = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class Before:
    """Data that are read from a base GGUF file before the patch, for comparison with the patched file.

    rows: tensor → token id → trained row, before encoding in the tensor's type. dtype: dtype to which trained rows are
    rounded before encoding in the tensor's type. untouched: tensor → digests of the rows that the patch must not
    change. every: True if ``untouched`` covers all rows, False if ``untouched`` covers a sample.
    """

    gguf: GgufModel
    rows: Mapping[str, Mapping[int, Array]]
    dtype: str
    untouched: Mapping[str, Digests]
    every: bool

    @classmethod
    def read(cls, gguf: GgufModel, adapters: Sequence[Adapter], dtype: str, *, every: bool) -> Before:
        """Read from the base file, before the patch, all data that the checks need after the patch.

        every: True to compute digests of all rows of every tensor, False to compute digests of a sample. Peak memory:
        one 8 MiB block of the file plus the digests.
        """
        rows = _rows(gguf, adapters)
        untouched = {}
        for name, tensor in gguf.tensors.items():
            trained, n_rows = rows.get(name, {}).keys(), tensor.n_rows
            ranges = all_rows(n_rows, tensor.row_nbytes) if every else sampled_rows(n_rows, trained)
            untouched[name] = digests(partial(gguf.holder(name).rows, name), ranges, trained)
        return cls(gguf, rows, dtype, untouched, every)


def check_patched(path: Path, before: Before) -> Iterator[Check]:
    """Compare a patched GGUF file with its base file and the adapters.

    path: path of the patched GGUF file, or of the first part of a split GGUF file.
    """
    files = [GgufFile.open(path.with_name(name)) for name in _names(path, len(before.gguf.files))]
    yield _check_keys(files[0], before)
    yield (tensors := _check_tensors(files, before))
    if not tensors.passed:
        return  # the rows cannot be matched with the base's rows
    for name, rows in before.rows.items():
        yield _check_rows(_holding(files, name), name, rows, before.dtype)
    yield _check_untouched(files, before)


def _rows(gguf: GgufModel, adapters: Sequence[Adapter]) -> dict[str, dict[int, Array]]:
    tied = _HEAD not in gguf.tensors
    by_tensor: dict[str, dict[int, Array]] = {}
    for adapter in adapters:
        adapter_rows: dict[str, dict[int, Array]] = {}
        for part in adapter.rows:
            head = part.module.rpartition(".")[2] in HEADS
            name = _HEAD if head and not tied else _EMBEDDING
            adapter_rows.setdefault(name, {}).update(zip(part.token_ids, part.rows, strict=True))
        if not tied and _HEAD not in adapter_rows and _has_duplicate_head(gguf):
            adapter_rows[_HEAD] = adapter_rows[_EMBEDDING]
        for name, rows in adapter_rows.items():
            by_tensor.setdefault(name, {}).update(rows)
    return by_tensor


def _has_duplicate_head(gguf: GgufModel) -> bool:
    """Whether the GGUF file has a separate LM head with the same values as the embedding."""
    embedding, head = gguf.tensors[_EMBEDDING], gguf.tensors[_HEAD]
    if (embedding.type, embedding.shape) != (head.type, head.shape):
        return False
    pairs = [(gguf.holder(name), name) for name in (_EMBEDDING, _HEAD)]
    return all(
        len({file.rows(name, row, row + 1).tobytes() for file, name in pairs}) == 1 for row in sample(embedding.n_rows)
    )


def _names(path: Path, count: int) -> list[str]:
    first = f"-00001-of-{count:05}.gguf"
    if count == 1 or not path.name.endswith(first):
        return [path.name]
    return [path.name.removesuffix(first) + f"-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]


def _holding(files: Sequence[GgufFile], name: str) -> GgufFile:
    return next(file for file in files if name in file.tensors)


def _check_keys(file: GgufFile, before: Before) -> Check:
    """Check that the patch changed only metadata about tokens, and that the metadata list one token per row."""
    old, new = _values(before.gguf.files[0]), _values(file)
    rows = max(
        [*(token_id + 1 for tensor_rows in before.rows.values() for token_id in tensor_rows), _n_rows(before.gguf)]
    )
    grown = rows != _n_rows(before.gguf)
    free = ("tokenizer.", *PROVENANCE, *(("general.size_label",) if grown else ()))
    wrong = [
        name
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(free) and not (grown and name.endswith(".vocab_size"))
    ]
    tokens = new.get(_TOKENS)
    if tokens is not None and tokens != old.get(_TOKENS) and tokens[1] != rows:
        wrong.append(f"{_TOKENS}: expected {rows} tokens (one per embedding row), found {tokens[1]}")
    detail = f"{len(new)} metadata keys match the base"
    if wrong:
        detail = f"{len(wrong)} metadata keys differ from the base; the first is {wrong[0]}"
    return Check(name="metadata", passed=not wrong, detail=detail)


def _n_rows(gguf: GgufModel) -> int:
    return gguf.tensors[_EMBEDDING].n_rows


def _values(file: GgufFile) -> dict[str, Any]:
    """Return the metadata of a GGUF file as values that can be compared with ``==``.

    To save memory, each metadata array is replaced by a tuple of the array's type, length and digest.
    """
    out: dict[str, Any] = {}
    for name, value in file.metadata.items():
        if isinstance(value, GgufArray):
            raw = np.empty(value.nbytes, np.uint8)
            read_into(file.path, value.offset_bytes, raw)
            out[name] = (value.item_type, value.count, hashlib.sha256(raw.data).digest())
        else:
            out[name] = value
    return out


def _check_tensors(files: Sequence[GgufFile], before: Before) -> Check:
    """Check that the patch did not change the name, type, shape or file of any tensor.

    Only the embedding and the LM head may have more rows after the patch than before the patch.
    """
    wrong = []
    for old, new in zip(before.gguf.files, files, strict=True):
        if list(old.tensors) != list(new.tensors):
            wrong.append(f"{new.path.name}: tensor names differ from the base")
            continue
        for name, tensor in old.tensors.items():
            rows = max([*(token_id + 1 for token_id in before.rows.get(name, {})), tensor.shape[0]])
            want = (tensor.type, (rows, *tensor.shape[1:]))
            if (stored := (new.tensors[name].type, new.tensors[name].shape)) != want:
                wrong.append(f"{name}: expected {want}, found {stored}")
    count = sum(len(file.tensors) for file in files)
    return Check(
        name="tensors",
        passed=not wrong,
        detail=wrong[0] if wrong else f"names, types and shapes of {count} tensors match the base",
    )


def _check_rows(file: GgufFile, name: str, rows: Mapping[int, Array], dtype: str) -> Check:
    """Check that every trained row in the patched file equals the adapter's row, encoded in the tensor's type."""
    storage = file.tensors[name].type
    wrong = [
        token_id
        for token_id, row in rows.items()
        if not np.array_equal(file.rows(name, token_id, token_id + 1), encode(cast(row[None], dtype), storage))
    ]
    detail = f"{len(rows)} trained rows equal the adapter's rows, rounded to {dtype} and then encoded in {storage}"
    if wrong:
        detail = (
            f"{name}: {len(wrong)} of {len(rows)} trained rows differ from the adapter; the first is token {wrong[0]}"
        )
    return Check(name=f"{name} rows", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _check_untouched(files: Sequence[GgufFile], before: Before) -> Check:
    wrong = []
    for name, kept in before.untouched.items():
        read = partial(_holding(files, name).rows, name)
        changed = before.rows.get(name, {}).keys()
        wrong += [f"{name}: {describe_range('row', *rows)}" for rows in differing(read, kept, changed)]
    count = sum(map(len, before.untouched.values()))
    return check_untouched(
        wrong, "all untrained rows equal the base" if before.every else f"{count} sampled untrained rows equal the base"
    )
