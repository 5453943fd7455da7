"""Collects the changes that adapters make to each base tensor.

If no base tensor fits an edit, the merge stops with an error. An edit is one change that an adapter makes to one
parameter of the model.

The destination of an edit is ``EMBEDDING``, ``HEAD`` or the name of another stored tensor. If the base model ties
embedding and head, ``EMBEDDING`` and ``HEAD`` may refer to the same stored tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from exporter.errors import BadInput, NotExpressible
from exporter.merge.assignment import assign, assign_bias, refuse_one_side
from exporter.merge.ledger import Ledger
from exporter.peft_modules.replacements import Replacement
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import Edit, FullModule, LowRank, TokenRows
from exporter.sources.places import EMBEDDING, HEAD, has_embedding_pair, is_never_run, resized_originals, use_of

#: Pattern of the number of an expert in the name of a stored tensor.
_EXPERT_NUMBER: Final = re.compile(r"\.\d+\.(?=[^.]+\.weight$)")

_NO_EFFECT: Final = "without effect, because the model never runs the module"


@dataclass(frozen=True)
class LedgerEntry:
    """An entry of the ledger: an adapter tensor, the rule that merges that tensor, and the base tensors that change."""

    path: Path
    key: str
    rule: str
    into: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """The changes to one tensor, which are applied in this order: replace the tensor, set token rows, add updates.

    replaced: the edit with the new whole tensor. rows: the edits that set token rows. updates: the low-rank updates to
    add. biases: if the tensor is a bias, the low-rank updates whose bias vectors are added to the tensor.
    """

    replaced: FullModule | None = None
    rows: tuple[TokenRows, ...] = ()
    updates: tuple[LowRank, ...] = ()
    biases: tuple[LowRank, ...] = ()


#: The change of a tensor that no adapter changes. Comparing identities is fast for checkpoints with 100,000 tensors.
NO_CHANGE: Final = Change()


@dataclass(frozen=True)
class Consumed:
    """A tensor of an adapter file and the rule that merges the tensor.

    destination: name of the base tensor that changes, or None if the adapter tensor has no effect of its own. edit: the
    edit that contains the tensor. If an edit contains several tensors, ``edit`` is set for only one of the tensors, so
    that the edit is applied once. If the tensor repeats another adapter tensor or a base tensor, ``edit`` is None.
    by_name: {name of a stored tensor: part of the edit that changes the stored tensor}.
    """

    path: Path
    key: str
    rule: str
    destination: str | None
    edit: Edit | None = None
    by_name: Mapping[str, Edit] = field(default_factory=dict)


@dataclass(frozen=True)
class Gathered:
    """The changes to each destination (a base tensor), and the adapter tensors from which the changes were derived."""

    changes: dict[str, Change]
    consumed: Sequence[Consumed]

    @property
    def warnings(self) -> list[str]:
        """Return one warning for each trained adapter tensor that has no effect on the model."""
        return [f"{entry.path}: {entry.key}: {_NO_EFFECT}" for entry in self.consumed if entry.rule == _NO_EFFECT]


def gather(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Gathered:
    """Collect the changes of all adapters, grouped by the base tensor that changes.

    Raises TensorMismatch if the base model lacks the module of an edit, and BadInput if two adapters set values of the
    same token row or of the same tensor. Raises LedgerError if no merge rule or more than one merge rule handles an
    adapter tensor. Raises NotExpressible for an edit whose effect cannot be stored in the weights of the base model.
    """
    changes: dict[str, Change] = {}
    consumed: list[Consumed] = []
    for adapter in adapters:
        ledger = Ledger(adapter.weights, adapter.keys, what="rule")
        entries = list(_consumed(checkpoint, adapter))
        for entry in entries:
            ledger.take(entry.key, entry.rule)
            if entry.edit is not None and entry.destination is not None:
                for name, edit in entry.by_name.items():
                    changes[name] = _add(changes.get(name, Change()), name, edit)
        for use, rows in _tied_rows(checkpoint, adapter, entries):
            changes[use] = _add(changes.get(use, Change()), use, rows)
        ledger.close()
        consumed += entries
    return Gathered(changes, consumed)


def _consumed(checkpoint: Checkpoint, adapter: Adapter) -> Iterator[Consumed]:
    path = adapter.weights
    first_for: dict[tuple[type, str], Edit] = {}
    resized = resized_originals(checkpoint, adapter)
    for edit in (*adapter.edits, *resized):
        if _has_no_effect(checkpoint, edit):
            yield from (Consumed(path, key, _NO_EFFECT, None) for key in edit.keys)
            continue
        by_name = assign(checkpoint, edit)
        destination = _label(by_name)
        first = first_for.get((type(edit), destination)) if destination in (EMBEDDING, HEAD) else None
        if first is not None:
            _require_same(first, edit)
            yield from (Consumed(path, key, f"copy of {first.key}", None) for key in edit.keys)
            continue
        first_for[type(edit), destination] = edit
        rule = _rule(edit)
        bias = edit.bias.spec.name if isinstance(edit, LowRank) and edit.bias else None
        for number, key in enumerate(edit.keys):
            if key != bias:
                yield Consumed(path, key, rule, destination, *((edit, by_name) if number == 0 else ()))
        if bias is not None:
            assert isinstance(edit, LowRank)
            biases = assign_bias(checkpoint, edit)
            yield Consumed(path, bias, "bias beside an update", _label(biases), edit, biases)
    applied = {original.key for original in resized}
    yield from (Consumed(path, key, reason, None) for key, reason in adapter.unused.items() if key not in applied)


def _has_no_effect(checkpoint: Checkpoint, edit: Edit) -> bool:
    """Whether the edit changes a module that the model never runs."""
    in_place = isinstance(edit, TokenRows) or (isinstance(edit, FullModule) and edit.in_place)
    return not in_place and is_never_run(checkpoint, edit.module)


def _rule(edit: Edit) -> str:
    if isinstance(edit, TokenRows):
        return f"{len(edit.token_ids)} rows"
    if isinstance(edit, Replacement):
        return f"{edit.change.type.title} merged by PEFT"
    if isinstance(edit, LowRank):
        return f"{'DoRA' if edit.magnitude else 'LoRA'} update of rank {edit.rank}"
    return "whole tensor"


def _label(names: Iterable[str]) -> str:
    """Return the destination names as one text for display, in which ``*`` replaces the numbers of experts."""
    listed = list(names)
    return (
        listed[0] if len(listed) == 1 else ", ".join(dict.fromkeys(_EXPERT_NUMBER.sub(".*.", name) for name in listed))
    )


def _tied_rows(
    checkpoint: Checkpoint, adapter: Adapter, entries: Sequence[Consumed]
) -> Iterable[tuple[str, TokenRows]]:
    """Yield (``HEAD``, rows of the embedding) or (``EMBEDDING``, rows of the head) if tying requires equal rows.

    If the config of the base model ties embedding and head, PEFT also writes the rows of the embedding to the head,
    unless the adapter contains separate rows or a trained copy for the head. Adapter files of old PEFT versions may
    store the rows of a tied embedding only under the name of the head.
    """
    rows = {
        entry.destination: entry.edit
        for entry in entries
        if isinstance(entry.edit, TokenRows) and entry.destination in (EMBEDDING, HEAD)
    }
    own_head = any(
        isinstance(entry.edit, FullModule) and not entry.edit.in_place and entry.destination == HEAD
        for entry in entries
    )
    differ = rows.keys() == {EMBEDDING, HEAD} and rows[EMBEDDING].token_ids != rows[HEAD].token_ids
    if EMBEDDING in rows and (differ or own_head) and has_embedding_pair(checkpoint):  # PEFT then ties no module
        refuse_one_side(rows[EMBEDDING])
    if EMBEDDING in rows and HEAD not in rows and checkpoint.tie.tied_in_config and not own_head:
        yield HEAD, rows[EMBEDDING]
    if HEAD in rows and EMBEDDING not in rows and checkpoint.tie.tied and not _targets_head(checkpoint, adapter):
        yield EMBEDDING, rows[HEAD]


def _targets_head(checkpoint: Checkpoint, adapter: Adapter) -> bool:
    """Whether the adapter's config targets the output head but not the input embedding."""
    targets = adapter.config.get("trainable_token_indices") or adapter.config.get("target_modules") or ()
    modules = [targets] if isinstance(targets, str) else [name for name in targets if isinstance(name, str)]
    uses = {use_of(checkpoint, module) for module in modules}
    return HEAD in uses and EMBEDDING not in uses


def _require_same(first: Edit, edit: Edit) -> None:
    """Raise an error if two edits of one adapter set different values for the same stored matrix.

    An adapter may contain two edits of one matrix, because several modules of a model may share the matrix.
    """
    if isinstance(first, TokenRows) and isinstance(edit, TokenRows):
        same = first.token_ids == edit.token_ids and np.array_equal(first.rows, edit.rows)
    elif isinstance(first, FullModule) and isinstance(edit, FullModule):
        # A trained copy and the base's tensor below the copy are not compared, because the model computes with the
        # copy.
        same = first.equals(edit)
    else:
        same = False
    if not same:
        raise NotExpressible(
            f"{edit.path}: {edit.key}",
            f"the values differ from {first.key}, but the model uses a single tensor for both names",
        )


def _add(change: Change, destination: str, edit: Edit) -> Change:
    if isinstance(edit, TokenRows):
        _require_disjoint(change.rows, edit, destination)
        return replace(change, rows=(*change.rows, edit))
    if isinstance(edit, FullModule):
        if change.replaced is not None and not _is_same_grown_matrix(change.replaced, edit):
            raise BadInput(
                f"{edit.path}: {edit.key}: expected only one adapter to set {destination}, "
                f"found that {change.replaced.path} also sets {destination}"
            )
        return replace(change, replaced=change.replaced or edit)
    assert isinstance(edit, LowRank), "merged_by_peft must first replace changes that only PEFT can merge"
    if edit.bias is not None and destination.endswith("bias"):
        return replace(change, biases=(*change.biases, edit))
    if any((update.magnitude or edit.magnitude) and not _are_disjoint(update, edit) for update in change.updates):
        raise BadInput(
            f"{edit.path}: {edit.key}: expected a DoRA update to be the only update of {destination}, "
            f"found another update in {change.updates[0].path}"
        )
    return replace(change, updates=(*change.updates, edit))


def _are_disjoint(first: LowRank, second: LowRank) -> bool:
    """Whether two updates of one adapter change different rows of a stored tensor that combines several parameters."""
    if first.part is None or second.part is None or first.path != second.path:
        return False
    return (first.module, first.parameter) != (second.module, second.parameter)


def _is_same_grown_matrix(first: FullModule, edit: FullModule) -> bool:
    """Whether two edits contain equal resized embedding matrices. A resized matrix has additional rows for new tokens.

    If several adapters were trained on the same base model with a resized vocabulary, each may contain the resized
    matrix.
    """
    return first.in_place and edit.in_place and first.equals(edit)


def _require_disjoint(earlier: Sequence[TokenRows], edit: TokenRows, destination: str) -> None:
    owner = {token_id: rows.path for rows in earlier for token_id in rows.token_ids}
    for token_id in edit.token_ids:
        if token_id in owner:
            raise BadInput(
                f"{edit.path}: {edit.key}: expected each row of the {destination} to be set once, "
                f"found that {owner[token_id]} also sets the row of token {token_id}"
            )
