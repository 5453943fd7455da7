"""What adapters do to each tensor, gathered: every edit goes to one slot, or the merge stops.

A slot is the name of a stored tensor, or one of the two uses of the vocabulary, ``EMBEDDING`` and ``HEAD``, whose
tensors depend on how the base ties them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from exporter.errors import BadInput, NotExpressible, TensorMismatch
from exporter.merge.experts import by_expert
from exporter.merge.ledger import Ledger
from exporter.merge.names import stored_name, use_of
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import Edit, FullModule, LowRank, TokenRows
from exporter.tensors import same_values

EMBEDDING: Final = "embedding"
HEAD: Final = "head"

#: The number of an expert in a stored name.
_EACH: Final = re.compile(r"\.\d+\.(?=[^.]+\.weight$)")


@dataclass(frozen=True)
class LedgerEntry:
    """One line of the ledger: a tensor of an adapter, the rule that took it, the base tensors it goes into."""

    path: Path
    key: str
    rule: str
    into: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """What happens to one tensor, in this order: it is replaced, rows are set, updates are added.

    biases: updates whose ``bias`` is added to the tensor, which is a bias itself.
    """

    replaced: FullModule | None = None
    rows: tuple[TokenRows, ...] = ()
    updates: tuple[LowRank, ...] = ()
    biases: tuple[LowRank, ...] = ()


@dataclass(frozen=True)
class Gathered:
    """Changes by slot, and where every adapter tensor went: (adapter's file, key, rule, slot or None)."""

    changes: dict[str, Change]
    entries: Sequence[tuple[Path, str, str, str | None]]


def gather(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Gathered:
    """Sort the edits of all adapters into slots.

    Raises TensorMismatch for a module that the base lacks, BadInput where two adapters set the same, LedgerError for
    a tensor that no rule takes or two take, NotExpressible for what stored weights cannot say.
    """
    changes: dict[str, Change] = {}
    taken: list[tuple[Path, str, str, str | None]] = []
    for adapter in adapters:
        ledger = Ledger(adapter.weights, adapter.keys, what="rule")
        entries = list(_entries(checkpoint, adapter))
        for edit, key, rule, slot in entries:
            ledger.take(key, rule)
            taken.append((adapter.weights, key, rule, slot))
            if edit is not None and slot is not None:
                for name, piece in _pieces(checkpoint, edit, slot).items():
                    changes[name] = _add(changes.get(name, Change()), name, piece)
        for slot, rows in _following(checkpoint, adapter, entries):
            changes[slot] = _add(changes.get(slot, Change()), slot, rows)
        ledger.close()
    return Gathered(changes, taken)


_Entry = tuple[Edit | None, str, str, str | None]


def _entries(checkpoint: Checkpoint, adapter: Adapter) -> Iterable[_Entry]:
    """(edit, key, rule, slot) for every tensor; the edit stands with its first key, and not at all with a copy."""
    first_of: dict[tuple[type, str], Edit] = {}
    for edit in adapter.edits:
        slot = _slot(checkpoint, edit)
        twin = first_of.get((type(edit), slot)) if slot in (EMBEDDING, HEAD) else None
        if twin is not None:
            _require_same(twin, edit)
            yield from ((None, key, f"copy of {twin.key}", None) for key in edit.keys)
            continue
        first_of[type(edit), slot] = edit
        rule = _rule(edit)
        bias = edit.bias.spec.name if isinstance(edit, LowRank) and edit.bias else None
        for number, key in enumerate(edit.keys):
            if key != bias:
                yield edit if number == 0 else None, key, rule, slot
        if bias is not None:
            assert isinstance(edit, LowRank)
            yield edit, bias, "bias beside an update", _bias_slot(checkpoint, edit)
    yield from ((None, key, reason, None) for key, reason in adapter.unused.items())


def _rule(edit: Edit) -> str:
    if isinstance(edit, TokenRows):
        return f"{len(edit.token_ids)} rows"
    if isinstance(edit, LowRank):
        return f"{'DoRA' if edit.magnitude else 'LoRA'} update of rank {edit.rank}"
    return "whole tensor"


def _slot(checkpoint: Checkpoint, edit: Edit) -> str:
    """The slot of an edit's main tensor. Raises TensorMismatch for a module that is not in the base."""
    parameter = "weight" if isinstance(edit, TokenRows) else edit.parameter
    use = use_of(checkpoint, edit.module) if parameter == "weight" else None
    if use is not None:
        reaches_both = isinstance(edit, TokenRows) or (isinstance(edit, FullModule) and edit.in_place)
        if checkpoint.is_encoder_decoder and use == EMBEDDING and not reaches_both:
            _refuse_one_side(edit)
        return use
    name = stored_name(checkpoint, edit.module, parameter)
    if name is None and isinstance(edit, LowRank) and (experts := by_expert(checkpoint, edit)):
        return ", ".join(dict.fromkeys(_EACH.sub(".*.", name) for name in experts))
    if name is None:
        expected = f"a module of the base, such as {checkpoint.tie.embedding.removesuffix('.weight')}"
        raise TensorMismatch(edit.path, edit.key, expected=expected, found=edit.module)
    return name


def _pieces(checkpoint: Checkpoint, edit: Edit, slot: str) -> dict[str, Edit]:
    """Slot → what goes into it: the edit itself, or an expert's share of it."""
    return {**by_expert(checkpoint, edit)} if isinstance(edit, LowRank) and "*" in slot else {slot: edit}


def _refuse_one_side(edit: Edit) -> None:
    raise NotExpressible(
        f"{edit.path}: {edit.key}",
        "encoder and decoder have an embedding module each, and PEFT trained one of them alone",
        instead="train the same token rows for embedding and head, which reach both",
    )


def _bias_slot(checkpoint: Checkpoint, edit: LowRank) -> str:
    name = stored_name(checkpoint, edit.module, "bias")
    if name is None:
        raise NotExpressible(
            f"{edit.path}: {edit.bias.spec.name if edit.bias else edit.key}",
            f"{edit.module} has no bias in the base, and the architecture has no place for one",
            instead="train without lora_bias",
        )
    return name


def _following(checkpoint: Checkpoint, adapter: Adapter, entries: Sequence[_Entry]) -> Iterable[tuple[str, TokenRows]]:
    """Rows that a tied use gets from the other one, although the file has them once.

    PEFT goes by the config: where it says tied, rows of the embedding also serve as rows of the head, unless that has
    rows or a copy of its own. Files of old PEFT may hold tied rows under the head alone.
    """
    found = {slot: edit for edit, _, _, slot in entries if isinstance(edit, TokenRows) and slot in (EMBEDDING, HEAD)}
    own_head = any(isinstance(edit, FullModule) and not edit.in_place and slot == HEAD for edit, _, _, slot in entries)
    differ = found.keys() == {EMBEDDING, HEAD} and found[EMBEDDING].token_ids != found[HEAD].token_ids
    if checkpoint.is_encoder_decoder and EMBEDDING in found and (differ or own_head):  # PEFT then ties no module
        _refuse_one_side(found[EMBEDDING])
    if EMBEDDING in found and HEAD not in found and checkpoint.tie.tied_in_config and not own_head:
        yield HEAD, found[EMBEDDING]
    if HEAD in found and EMBEDDING not in found and checkpoint.tie.tied and not _targets_head(checkpoint, adapter):
        yield EMBEDDING, found[HEAD]


def _targets_head(checkpoint: Checkpoint, adapter: Adapter) -> bool:
    """Whether the adapter was told to train rows of the head, and not of the embedding."""
    named = adapter.config.get("trainable_token_indices") or adapter.config.get("target_modules") or ()
    modules = [named] if isinstance(named, str) else [name for name in named if isinstance(name, str)]
    uses = {use_of(checkpoint, module) for module in modules}
    return HEAD in uses and EMBEDDING not in uses


def _require_same(one: Edit, other: Edit) -> None:
    """Two edits of one adapter for one use must be one value, as where a model has several names for a matrix."""
    if isinstance(one, TokenRows) and isinstance(other, TokenRows):
        same = one.token_ids == other.token_ids and np.array_equal(one.rows, other.rows)
    elif isinstance(one, FullModule) and isinstance(other, FullModule):
        # A trained copy and the base's tensor below it: the copy is what the model computes with.
        same = same_values(one.tensor, other.tensor)
    else:
        same = False
    if not same:
        raise NotExpressible(
            f"{other.path}: {other.key}", f"it differs from {one.key}, and the model has one tensor for both"
        )


def _add(change: Change, slot: str, edit: Edit) -> Change:
    if isinstance(edit, TokenRows):
        _require_disjoint(change.rows, edit, slot)
        change = replace(change, rows=(*change.rows, edit))
    elif isinstance(edit, FullModule):
        if change.replaced is not None and not _equal(change.replaced, edit):
            raise BadInput(f"{edit.path}: {edit.key}: expected {slot} to be set once, found {change.replaced.path} too")
        change = replace(change, replaced=change.replaced or edit)
    elif edit.bias is not None and slot.endswith("bias"):
        change = replace(change, biases=(*change.biases, edit))
    else:
        if any(one.magnitude or edit.magnitude for one in change.updates):
            raise BadInput(
                f"{edit.path}: {edit.key}: expected a DoRA update to be alone on {slot}, "
                f"found {change.updates[0].path} too"
            )
        change = replace(change, updates=(*change.updates, edit))
    return change


def _equal(one: FullModule, other: FullModule) -> bool:
    """Several row adapters of one grown base may each carry the grown matrix."""
    return one.in_place and other.in_place and same_values(one.tensor, other.tensor)


def _require_disjoint(edits: Sequence[TokenRows], edit: TokenRows, slot: str) -> None:
    owner = {token_id: one.path for one in edits for token_id in one.token_ids}
    for token_id in edit.token_ids:
        if token_id in owner:
            raise BadInput(
                f"{edit.path}: {edit.key}: expected each row of the {slot} to be set once, "
                f"found token {token_id} set by {owner[token_id]} too"
            )
