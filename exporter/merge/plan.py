"""Plans a merge: decides which base tensors change, and by which computations.

The planning of a merge reads no tensor values of the base model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.errors import TensorMismatch
from exporter.io.parallel import Budget
from exporter.merge.changes import NO_CHANGE, Change, Gathered, LedgerEntry, gather
from exporter.merge.model import MergedModel, MergedTensor
from exporter.merge.passes import AddLowRank, AddVector, Cast, Pass, ReplaceRows, first_rows
from exporter.merge.tying import Resolved, resolve, untied_config
from exporter.merge.updates import bias_of, check_update, is_transposed, terms
from exporter.merge.vocabulary.files import adapter_files, merge_auxiliary_files
from exporter.merge.vocabulary.special_ids import follow, generation_config
from exporter.merge.vocabulary.tables import grown_tables, growth, padded
from exporter.merge.vocabulary.templates import merged_templates
from exporter.merge.vocabulary.tokens import rows_after, vocabulary
from exporter.merge.vocabulary.unused_tokens import left_out, without_unused
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.quantised import quantiser_floats
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.hf.tables import TokenTable, replaced_biases, resize_config, token_tables
from exporter.sources.hf.tie import Tie
from exporter.sources.hf.tokenizer import Tokenizer
from exporter.sources.peft.adapter import NO_ADAPTERS_DIGEST, Adapter, combined_digest
from exporter.sources.peft.edits import GATHER, LowRank, TokenRows, is_shard, require_finite
from exporter.sources.places import EMBEDDING, HEAD
from exporter.tensors import FLOATS, cast

_DTYPE_NAMES: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class MergePlan:
    """The plan of a merge, which is complete before any tensor of the base model is read.

    sources: maps the name of each output tensor to the pair (name of the base tensor to change, changes). tie: whether
    and how embedding and head are tied after merging. vocab: number of rows of the merged embedding. files: auxiliary
    files to copy unchanged. templates, rewritten: as in MergedModel. moved_ids: {special token whose id changes: (id in
    the base model, id after merging)}. origins: hub repositories and commits of the inputs, for provenance. warnings:
    messages for the user, for example about adapter tensors without effect. tokenizer: the merged tokenizer, so that
    the vocabulary is decoded only once. dropped_tokens: texts of the tokens that were left out of the tokenizer.
    """

    checkpoint: Checkpoint
    adapters: Sequence[Adapter]
    ledger_entries: Sequence[LedgerEntry]
    tie: Tie
    sources: Mapping[str, tuple[str, Change]]
    vocab: int
    files: Mapping[str, Path]
    templates: Mapping[str, str]
    rewritten: Mapping[str, bytes]
    generation_config: Mapping[str, Any]
    moved_ids: Mapping[str, tuple[int | None, int]]
    tokenizer: Tokenizer | None
    grown: Sequence[TokenTable] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    dropped_tokens: Sequence[str] = ()

    def model(self, dtype: str | None = None, budget: Budget | None = None) -> MergedModel:
        """Return the merged model. Every merged value is rounded only once, to its final dtype.

        dtype: dtype of the merged floating-point tensors, or None to keep the stored dtypes. In a quantised base, the
        quantiser's own tensors, such as scales, keep their dtypes.
        """
        tensors: dict[str, FileTensor | MergedTensor] = {}
        kept = quantiser_floats(self.checkpoint.tensors) if dtype and self.checkpoint.quantisation else frozenset()
        changed = {*self.tie.names, *(table.name for table in self.grown)}
        for name, (stored, change) in self.sources.items():
            if dtype is None and change is NO_CHANGE and name == stored and name not in changed:
                tensors[name] = self.checkpoint.tensors[stored]  # the case of almost every tensor of a large mixture
                continue
            source, passes = self._passes(name, stored, change, None if stored in kept else dtype)
            unchanged = not passes and name == stored
            tensors[name] = source if unchanged else MergedTensor(name, source, passes, budget or Budget())
        file_name = lru_cache(lambda path: path.name)  # a large mixture has 100,000 tensors in a few files
        shards = {
            name: file_name(self.checkpoint.tensors[stored].place.path) for name, (stored, _) in self.sources.items()
        }
        return MergedModel(
            self.checkpoint.path,
            self._config(dtype),
            self.tie,
            tensors,
            shards,
            self.files,
            self.templates,
            self.rewritten,
            self.generation_config,
            self.origins,
            lambda: self.checkpoint.embedding_digest,
            lambda: combined_digest(NO_ADAPTERS_DIGEST, self.adapters),
        )

    @property
    def factor_nbytes(self) -> int:
        """Size in bytes of the largest float32 LoRA factors that a single merged tensor needs.

        The LoRA factors of a tensor stay in memory while the merged tensor is written.
        """
        updates = [change.updates for _, change in self.sources.values()]
        return max((sum(map(_factor_nbytes, of_tensor)) for of_tensor in updates), default=0)

    def _passes(self, name: str, stored: str, change: Change, dtype: str | None) -> tuple[FileTensor, list[Pass]]:
        base = self.checkpoint.tensors[stored]
        source = change.replaced.tensor if change.replaced else base
        if source.spec.dtype not in FLOATS:
            return source, []
        out = dtype or base.spec.dtype
        table = next((table for table in self.grown if table.name in (name, stored)), None)
        n_rows = self.vocab if table else source.spec.n_rows
        if name in self.tie.names:
            n_rows = rows_after(self.checkpoint, name, stored, change, self.vocab)
        steps: list[Pass] = []
        if change.replaced or (not change.updates and source.spec.dtype != out):
            steps.append(Cast("F32" if change.updates else out, finite=change.replaced is not None))
        if change.updates:
            if change.rows:
                steps += [] if steps else [Cast("F32")]
                steps.append(_replace_rows(change.rows, "F32", n_rows))
            oriented = tuple(
                (update, is_transposed(self.checkpoint, update, source.spec.shape, name)) for update in change.updates
            )
            steps.append(AddLowRank(partial(terms, oriented, source), out))
        elif change.rows:
            steps.append(_replace_rows(change.rows, out, n_rows))
        if n_rows < source.spec.n_rows and not change.rows:
            steps.append(first_rows(source.spec, out, n_rows))
        if change.biases:
            steps.append(AddVector(bias_of(change.biases), out))
        return source, [
            *steps,
            *(growth(table, source, out, self.vocab, tied=self.checkpoint.tie.tied) if table else ()),
        ]

    def _config(self, dtype: str | None) -> dict[str, Any]:
        config = copy.deepcopy(dict(self.checkpoint.config))
        nested = config.get("text_config")
        grown = self.vocab != self.checkpoint.tensors[self.checkpoint.tie.embedding].spec.n_rows
        if grown:
            resize_config(config, self.checkpoint, self.vocab)
        for table in (config, nested if isinstance(nested, dict) else {}):
            for key in ("dtype", "torch_dtype"):
                if key in table and dtype is not None:
                    table[key] = _DTYPE_NAMES[dtype]
            follow(table, self.moved_ids)
        if self.checkpoint.tie.tied and not self.tie.tied:
            untied_config(config)
        return config


def plan_merge(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], *, untie: bool = False, drop_unused: bool = False
) -> MergePlan:
    """Plan the merge of the adapters. untie: whether to write a separate tensor for the head if the base ties the head.

    drop_unused: whether to leave out tokens of the tokenizer that have no embedding row and that no text needs.
    Raises TensorMismatch if an edit does not fit the shape of the changed tensor or the size of the vocabulary. Raises
    LedgerError if no merge rule or more than one merge rule handles an adapter tensor. Raises BadInput if two adapters
    set values of the same token row or of the same tensor. Raises NotExpressible if embedding and head share one stored
    tensor but need different values after merging.
    """
    gathered = gather(checkpoint, adapters)
    resolved = resolve(checkpoint, gathered.changes, untie=untie)
    sources = {
        **{name: (name, gathered.changes.get(name, NO_CHANGE)) for name in checkpoint.tensors},
        **resolved.sources,
    }
    tables = frozenset(table.name for table in token_tables(checkpoint) if table.axis == 0)
    for name, (stored, change) in sources.items():
        _check_shapes(checkpoint, name, stored, change, grows=name in tables)
    files = merge_auxiliary_files(checkpoint.auxiliary_files, adapters)
    tokenizer = Tokenizer.open(files["tokenizer.json"]) if "tokenizer.json" in files else None
    matrices = {name: source for name, source in resolved.sources.items() if name in resolved.tie.names}
    vocab = vocabulary(checkpoint, resolved.tie, matrices, tokenizer, drop_unused=drop_unused)
    own, dropped = adapter_files(adapters), list[str]()
    if drop_unused and tokenizer and max(tokenizer.ids, default=-1) >= vocab:
        templates, _ = merged_templates(checkpoint.auxiliary_files, own, files)
        files, dropped = without_unused(files, tokenizer, vocab, templates.values())
        tokenizer = Tokenizer.open(files["tokenizer.json"])
    generation, moved = generation_config(checkpoint.auxiliary_files, files)
    entries = _ledger_entries(gathered, resolved)
    sources = dict(padded(checkpoint, sources, vocab, tokenizer))
    grown = grown_tables(checkpoint, sources, vocab)
    if grown:
        sources |= {name: (bias, _without_copy(sources[bias][1])) for name, bias in replaced_biases(checkpoint).items()}
    return MergePlan(
        checkpoint,
        adapters,
        entries,
        resolved.tie,
        sources,
        vocab,
        files,
        *merged_templates(checkpoint.auxiliary_files, own, files),
        generation,
        moved,
        tokenizer,
        grown,
        warnings=[*gathered.warnings, *map(left_out, dropped)],
        dropped_tokens=dropped,
    )


def _without_copy(change: Change) -> Change:
    """Return ``change``, or no change if PEFT trained a copy of the module, which the base's own parameter ignores."""
    return NO_CHANGE if change.replaced and not change.replaced.in_place else change


def _ledger_entries(gathered: Gathered, resolved: Resolved) -> list[LedgerEntry]:
    """Return the ledger entries to show to the user, with tensor names in place of ``EMBEDDING`` and ``HEAD``."""
    tie = resolved.tie
    embeddings = (tie.embedding, *tie.copies)
    into = {
        EMBEDDING: tie.names if tie.tied else embeddings,
        HEAD: embeddings if tie.tied else (str(tie.head), *tie.head_copies),
    }
    entries = []
    for tensor in gathered.consumed:
        rule, destination = tensor.rule, tensor.destination
        names = () if destination is None else into.get(destination, (destination,))
        if tie.tied and destination == HEAD and EMBEDDING in gathered.changes:
            rule, names = f"{rule} of the tied head, merged as part of the embedding", ()
        elif tie.tied and destination in (EMBEDDING, HEAD):
            rule = f"{rule} of the embedding and the tied head"
        entries.append(LedgerEntry(tensor.path, tensor.key, rule, names))
    return entries


def _check_shapes(checkpoint: Checkpoint, name: str, stored: str, change: Change, *, grows: bool) -> None:
    """Raise TensorMismatch if the shape of one of the edits in ``change`` does not fit the stored tensor."""
    if change is NO_CHANGE or change == NO_CHANGE:
        return
    base = checkpoint.tensors[stored]
    spec = change.replaced.tensor.spec if change.replaced else base.spec
    grows |= name in checkpoint.tie.names or name != stored
    if base.spec.dtype not in FLOATS or (change.rows and len(base.spec.shape) != 2):
        hint = (
            "the base is quantised; merge into the checkpoint from which the base was made"
            if base.spec.dtype == "U8"
            else ""
        )
        actual = f"{base.spec.dtype} {base.spec.shape}"
        raise TensorMismatch(base.place.path, stored, expected="a floating-point matrix", found=actual, hint=hint)
    if change.replaced and spec.shape[grows:] != base.spec.shape[grows:]:
        whole = change.replaced
        hint = GATHER if is_shard(spec.shape) and len(base.spec.shape) > 1 else ""
        raise TensorMismatch(whole.path, whole.key, expected=f"shape {base.spec.shape}", found=spec.shape, hint=hint)
    for token_rows in change.rows:
        if token_rows.rows.shape[1] != spec.shape[1]:
            hint = "the adapter was trained on a different base"
            expected, actual = f"rows of width {spec.shape[1]}", token_rows.rows.shape[1]
            raise TensorMismatch(token_rows.path, token_rows.key, expected=expected, found=actual, hint=hint)
        if not grows and token_rows.token_ids[-1] >= spec.n_rows:
            expected = f"token ids below {spec.n_rows}, the number of rows of {name}"
            raise TensorMismatch(token_rows.path, token_rows.key, expected=expected, found=token_rows.token_ids[-1])
    for update in change.updates:
        check_update(checkpoint, update, spec.shape, name)
    for biased in change.biases:
        wanted = biased.part.shape if biased.part else spec.shape
        if biased.bias is None or biased.bias.spec.shape != wanted:
            given = biased.bias.spec.shape if biased.bias else "none"
            raise TensorMismatch(biased.path, biased.key, expected=f"a bias of shape {wanted}", found=given)
        require_finite(biased.path, biased.bias)


def _factor_nbytes(update: LowRank) -> int:
    return 4 * len(update.keys) * max(update.down.spec.nbytes, update.up.spec.nbytes)


def _replace_rows(edits: Sequence[TokenRows], dtype: str, n_rows: int) -> ReplaceRows:
    """Return a pass that sets the token rows of all adapters in one tensor.

    dtype: the dtype of the merged tensor. Raises TensorMismatch if a value exceeds the range of ``dtype``.
    """
    rounded = []
    for edit in edits:
        rows = cast(edit.rows, dtype)
        too_large = np.flatnonzero(~np.isfinite(rows.astype(np.float32)).all(axis=1))
        if too_large.size:
            actual = f"a value outside the range in the row of token {edit.token_ids[too_large[0]]}"
            raise TensorMismatch(edit.path, edit.key, expected=f"values in the range of {dtype}", found=actual)
        rounded.append(rows)
    ids = np.concatenate([edit.token_ids for edit in edits])
    order = np.argsort(ids)
    return ReplaceRows(tuple(ids[order].tolist()), np.concatenate(rounded)[order], n_rows)
