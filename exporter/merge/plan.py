"""From adapters and a checkpoint to passes: what changes where, and by which rule. Reads no tensor of the base."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import BadInput, NotExpressible, TensorMismatch
from exporter.merge.ledger import Ledger
from exporter.merge.model import MergedModel
from exporter.merge.passes import Cast, Pass, ReplaceRows
from exporter.merge.side_files import merge_side_files
from exporter.sources.adapter import Adapter, TokenRows
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.tokenizer import token_ids as tokenizer_ids
from exporter.tensors import FLOATS, cast


@dataclass(frozen=True)
class Booking:
    """One line of the ledger: a tensor of an adapter, the rule that took it, the base tensors it goes into."""

    path: Path
    key: str
    rule: str
    into: tuple[str, ...]


@dataclass(frozen=True)
class MergePlan:
    """The decisions of a merge, before any byte of the base is read.

    origins: which repositories and commits of the hub the inputs are, for provenance.
    """

    checkpoint: Checkpoint
    adapters: Sequence[Adapter]
    bookings: Sequence[Booking]
    targets: Mapping[str, Sequence[TokenRows]]
    vocab: int
    files: Mapping[str, Path]
    origins: Mapping[str, str] = field(default_factory=dict)

    def model(self, dtype: str | None = None) -> MergedModel:
        """The merged model with floating-point tensors in ``dtype`` (None: as stored). Rows are rounded once."""
        passes: dict[str, Sequence[Pass]] = {}
        for name, tensor in self.checkpoint.tensors.items():
            steps: list[Pass] = []
            if dtype is not None and tensor.spec.dtype in FLOATS and tensor.spec.dtype != dtype:
                steps.append(Cast(dtype))
            if name in self.targets:
                steps.append(_replace_rows(self.targets[name], dtype or tensor.spec.dtype, self._n_rows(name)))
            if steps:
                passes[name] = steps
        return MergedModel(self.checkpoint, self._config(dtype), self.files, passes, self._provenance())

    def _n_rows(self, name: str) -> int:
        grows = name in (self.checkpoint.tie.embedding, self.checkpoint.tie.head)
        return self.vocab if grows else self.checkpoint.tensors[name].spec.n_rows

    def _config(self, dtype: str | None) -> dict[str, Any]:
        config = copy.deepcopy(dict(self.checkpoint.config))
        names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        nested = config.get("text_config")
        for table in (config, nested if isinstance(nested, dict) else {}):
            if "vocab_size" in table:
                table["vocab_size"] = self.vocab
            for key in ("dtype", "torch_dtype"):
                if key in table and dtype is not None:
                    table[key] = names[dtype]
        return config

    def _provenance(self) -> dict[str, str]:
        return {"base.embedding_sha256": self.checkpoint.embedding_digest, **self.origins}


def plan_merge(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> MergePlan:
    """Decide which rows go where.

    Raises TensorMismatch for rows that do not fit their tensor or its vocabulary, LedgerError for an adapter tensor
    that no rule takes or that two take, BadInput for adapters that set the same token, NotExpressible for head rows
    that differ from the embedding's on a tied base.
    """
    bookings: list[Booking] = []
    targets: dict[str, list[TokenRows]] = {}
    for adapter in adapters:
        parts = adapter.parts
        ledger = Ledger(parts[0].path, [part.key for part in parts], what="rule")
        for booking, part in _book(checkpoint, parts):
            ledger.take(booking.key, booking.rule)
            bookings.append(booking)
            for name in booking.into:
                targets.setdefault(name, []).append(part)
        ledger.close()
    for name, parts in targets.items():
        _check_disjoint(name, parts)
        for part in parts:
            _check_width(checkpoint, name, part)
    files = merge_side_files(checkpoint, adapters)
    vocab = _vocab(checkpoint, targets, files)
    return MergePlan(checkpoint, adapters, bookings, targets, vocab, files)


def _book(checkpoint: Checkpoint, parts: Sequence[TokenRows]) -> list[tuple[Booking, TokenRows]]:
    """Pair every part with the base tensors it goes into."""
    tie = checkpoint.tie
    embedding = tie.embedding.removesuffix(".weight")
    head = (tie.head or "lm_head.weight").removesuffix(".weight")
    by_module = {part.module: part for part in parts}
    booked = []
    for part in parts:
        into: tuple[str, ...]
        if tie.tied and part.module == head and (twin := by_module.get(embedding)):
            if not np.array_equal(twin.rows, part.rows):
                raise NotExpressible(
                    f"{part.path}: {part.key}",
                    "the base ties its head to the embedding, but the adapter has other rows for the head",
                    instead="train with tied rows; untying at merge is not in this version",
                )
            rule, into = "copy of the tied embedding's rows", ()
        elif tie.tied and part.module in (embedding, head):
            rule = "rows of the embedding and the tied head"
            into = (tie.embedding, tie.head) if tie.head else (tie.embedding,)
        elif f"{part.module}.weight" in checkpoint.tensors:
            rule, into = "rows of one matrix", (f"{part.module}.weight",)
        else:
            expected = f"a module of the base, such as {embedding}"
            raise TensorMismatch(part.path, part.key, expected=expected, found=part.module)
        booked.append((Booking(part.path, part.key, rule, into), part))
    return booked


def _check_disjoint(name: str, parts: Sequence[TokenRows]) -> None:
    owner: dict[int, Path] = {}
    for part in parts:
        for token_id in part.token_ids:
            if token_id in owner:
                raise BadInput(
                    f"{part.path}: {part.key}: expected each row of {name} to be set once, "
                    f"found token {token_id} set by {owner[token_id]} too"
                )
            owner[token_id] = part.path


def _check_width(checkpoint: Checkpoint, name: str, part: TokenRows) -> None:
    spec = checkpoint.tensors[name].spec
    if len(spec.shape) != 2 or spec.dtype not in FLOATS:
        where = checkpoint.tensors[name].place.path
        raise TensorMismatch(where, name, expected="a floating-point matrix", found=f"{spec.dtype} {spec.shape}")
    if part.rows.shape[1] != spec.shape[1]:
        hint = "the adapter was trained on another base"
        raise TensorMismatch(
            part.path, part.key, expected=f"rows of width {spec.shape[1]}", found=part.rows.shape[1], hint=hint
        )


def _vocab(checkpoint: Checkpoint, targets: Mapping[str, Sequence[TokenRows]], files: Mapping[str, Path]) -> int:
    """Rows of the merged embedding; the tokenizer must name every new one, and every matrix must get it."""
    tie = checkpoint.tie
    stored = checkpoint.tensors[tie.embedding].spec.n_rows
    tokenizer = files.get("tokenizer.json")
    known = tokenizer_ids(tokenizer) if tokenizer else set()
    vocab = stored
    for name, parts in targets.items():
        grows = name in (tie.embedding, tie.head)
        limit = max(stored, max(known, default=-1) + 1) if grows else checkpoint.tensors[name].spec.n_rows
        for part in parts:
            if part.token_ids[-1] >= limit:
                expected = f"token ids below {limit} (rows of {name})"
                hint = "new tokens need the tokenizer that names them beside the adapter" if grows else ""
                raise TensorMismatch(part.path, part.key, expected=expected, found=part.token_ids[-1], hint=hint)
            if grows:
                vocab = max(vocab, part.token_ids[-1] + 1)
    if tokenizer and known and max(known) >= vocab:
        raise BadInput(f"{tokenizer}: expected token ids below {vocab} (rows of {tie.embedding}), found {max(known)}")
    growing = {tie.embedding} | ({tie.head} if tie.head else set())
    for name in sorted(growing) if vocab > stored else []:
        covered = {token_id for part in targets.get(name, ()) for token_id in part.token_ids}
        missing = next((token_id for token_id in range(stored, vocab) if token_id not in covered), None)
        if missing is not None:
            raise BadInput(
                f"{checkpoint.path}: {name}: expected the adapters to set every new row from {stored} to {vocab - 1}, "
                f"found none for token {missing}"
            )
    return vocab


def _replace_rows(parts: Sequence[TokenRows], dtype: str, n_rows: int) -> ReplaceRows:
    """One pass for all adapters' rows of one tensor, in the tensor's dtype after casting."""
    rounded = []
    for part in parts:
        rows = cast(part.rows, dtype)
        too_large = np.flatnonzero(~np.isfinite(rows.astype(np.float32)).all(axis=1))
        if too_large.size:
            found = f"a larger one in the row of token {part.token_ids[too_large[0]]}"
            raise TensorMismatch(part.path, part.key, expected=f"values that {dtype} can hold", found=found)
        rounded.append(rows)
    ids = np.concatenate([part.token_ids for part in parts])
    order = np.argsort(ids)
    return ReplaceRows(tuple(ids[order].tolist()), np.concatenate(rounded)[order], n_rows)
