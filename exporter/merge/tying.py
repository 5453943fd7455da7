"""Decides whether embedding and head stay tied after a merge, and from which stored tensors each matrix is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from exporter.errors import BadInput, NotExpressible
from exporter.merge.changes import Change
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.tie import Tie, parameters_to_untie
from exporter.sources.peft.edits import LowRank
from exporter.sources.places import EMBEDDING, HEAD, use_of
from exporter.tensors import Array, read

#: Name of the embedding's module → name of the head's module, used to name the tensor of an untied head. The head of
#: any other embedding is named lm_head.
_HEAD_OF: Final = {"embed_in": "embed_out"}


@dataclass(frozen=True)
class Resolved:
    """The stored tensors and the changes from which the merged embedding and the merged head are computed.

    tie: whether and how embedding and head are tied after merging. sources: maps the name of each output tensor to the
    pair (name of the base tensor to change, changes).
    """

    tie: Tie
    sources: Mapping[str, tuple[str, Change]]


def resolve(checkpoint: Checkpoint, changes: Mapping[str, Change], *, untie: bool) -> Resolved:
    """Decide from which stored tensors the merged embedding and the merged head are computed.

    If the base ties embedding and head, the two matrices stay tied if their merged values are equal. If the base ties
    embedding and head, raises NotExpressible if the merged values differ and ``untie`` is not set.
    """
    tie = checkpoint.tie
    embedding, head = changes.get(EMBEDDING, Change()), changes.get(HEAD, Change())
    if not tie.has_head:
        _refuse_untie(checkpoint, untie=untie)
        return Resolved(tie, dict.fromkeys((tie.embedding, *tie.copies), (tie.embedding, embedding)))
    if not tie.tied:
        sources = dict.fromkeys((tie.embedding, *tie.copies), (tie.embedding, embedding))
        heads = (tie.head, *tie.head_copies) if tie.head else ()
        return Resolved(tie, sources | {name: (str(tie.head), head) for name in heads})
    embedding, head = _share_base(embedding, head)
    if _same_result(embedding, head) and not untie:
        return Resolved(tie, dict.fromkeys(tie.names, (tie.embedding, embedding)))
    if not untie:
        raise NotExpressible(
            f"{checkpoint.path}: {tie.embedding}",
            f"the base ties embedding and head, but {_difference(embedding, head)}",
            instead="use --untie to write a separate head",
        )
    name = tie.head or _head_name(checkpoint)
    sources = dict.fromkeys((tie.embedding, *tie.copies), (tie.embedding, embedding))
    sources |= dict.fromkeys((name, *tie.head_copies), (tie.embedding, head))
    copies = list(tie.copies)
    for further, stored in parameters_to_untie(checkpoint.config, checkpoint.modules).items():
        if stored == tie.embedding:
            copies.append(further)
            sources[further] = (stored, embedding)
        else:
            change = changes.get(stored, Change())
            sources[further] = (stored, change)
            sources[stored] = (stored, Change() if _is_copy_of_head(checkpoint, change) else change)
    return Resolved(replace(tie, head=name, tied=False, tied_in_config=False, copies=tuple(copies)), sources)


def _is_copy_of_head(checkpoint: Checkpoint, change: Change) -> bool:
    """Whether PEFT trained a separate copy of the head, so that other tensors tied to the head do not change."""
    whole = change.replaced
    return whole is not None and not whole.in_place and use_of(checkpoint, whole.module) == HEAD


def _refuse_untie(checkpoint: Checkpoint, *, untie: bool) -> None:
    if untie:
        raise NotExpressible(
            f"{checkpoint.path}: --untie", "the model has no output head", instead="merge without --untie"
        )


def untied_config(config: dict[str, Any]) -> None:
    """Change ``config`` so that transformers loads the head from a separate tensor and does not tie the head.

    In a T5 config, tie_word_embeddings also controls whether the input of the head is scaled. Therefore, for T5, the
    old setting for scaling is recorded as scale_decoder_outputs.
    """
    nested = config.get("text_config")
    if config.get("model_type") == "t5":
        config.setdefault("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    config["tie_word_embeddings"] = False
    if isinstance(nested, dict) and "tie_word_embeddings" in nested:
        nested["tie_word_embeddings"] = False


def _head_name(checkpoint: Checkpoint) -> str:
    """Return the tensor name from which transformers loads the head if embedding and head are not tied."""
    embedding, modules = checkpoint.tie.embedding, checkpoint.modules
    module = embedding.split(".")[-2]
    prefix = "language_model." if embedding.startswith("language_model.") else ""
    by_name = f"{prefix}{_HEAD_OF.get(module, 'lm_head')}.weight"
    if modules is None or modules.architecture.head is None:
        return by_name
    head = f"{modules.architecture.head}.weight"
    return next((name for name in (by_name, f"language_model.{head}") if modules.loads(name) == head), head)


def _share_base(embedding: Change, head: Change) -> tuple[Change, Change]:
    """If an adapter tensor, such as a resized embedding, replaces one of two tied matrices, replace both matrices.

    An adapter tensor that was trained through ``modules_to_save`` is a separate copy and replaces only one matrix.
    """
    changed = [change.replaced for change in (embedding, head) if change.replaced and change.replaced.in_place]
    if len(changed) == 2 and not changed[0].equals(changed[1]):
        raise BadInput(
            f"{changed[1].path}: {changed[1].key}: expected the values of the tied tensor {changed[0].key}, "
            "found different values"
        )
    base = changed[0] if changed else None
    return replace(embedding, replaced=embedding.replaced or base), replace(head, replaced=head.replaced or base)


def _same_result(embedding: Change, head: Change) -> bool:
    """Whether two tied matrices (embedding and head) still have equal values after the changes."""
    whole, other_whole = embedding.replaced, head.replaced
    if (whole is None) != (other_whole is None) or (whole and other_whole and not whole.equals(other_whole)):
        return False
    if _rows(embedding).keys() != _rows(head).keys():
        return False
    if not all(np.array_equal(row, _rows(head)[token_id]) for token_id, row in _rows(embedding).items()):
        return False
    pairs = zip(embedding.updates, head.updates, strict=False)
    return len(embedding.updates) == len(head.updates) and all(_same_update(*pair) for pair in pairs)


def _rows(change: Change) -> dict[int, Array]:
    return {token_id: row for edit in change.rows for token_id, row in zip(edit.token_ids, edit.rows, strict=True)}


def _same_update(update: LowRank, other: LowRank) -> bool:
    """Whether a low-rank update of the embedding and a low-rank update of the head add equal values.

    If embedding and head are tied, PEFT stores the update twice; the factors for the head are the transposed factors
    for the embedding. For DoRA, the result is always False, because DoRA uses different norms for embedding and head.
    """
    if update.magnitude or other.magnitude or update.scaling != other.scaling or update.path != other.path:
        return False
    down, up = read(other.down), read(other.up)
    if update.target_type == "embedding" and other.target_type != "embedding":
        down, up = up.T, down.T
    return np.array_equal(read(update.down), down) and np.array_equal(read(update.up), up)


def _difference(embedding: Change, head: Change) -> str:
    changed = [name for name, change in (("the embedding", embedding), ("the head", head)) if change != Change()]
    if len(changed) == 1:
        return f"the adapters change only {changed[0]}"
    return "the adapters change embedding and head in different ways"
