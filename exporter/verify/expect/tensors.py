"""Compute the expected values of the tuned model's tensors from the base checkpoint and the adapters.

The computation does not use the exporter's merge code. The exporter and this computation share only the package
``exporter.models``, which maps module names to stored tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from exporter.errors import BadInput
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.tie import HEADS
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import FullModule, LowRank, TokenRows
from exporter.sources.places import EMBEDDING, HEAD, Place, is_never_run, place_of, resized_originals, use_of
from exporter.tensors import Array, read
from exporter.verify.by_peft.recomputed import recomputed
from exporter.verify.expect.expected import Expected
from exporter.verify.expect.tables import grow_tables


def expected(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, Expected]:
    """Return a dict from the name of each tensor in the base checkpoint to the tensor's expected values.

    If the base checkpoint has no separate tensor for the output head, the expected values of the head have the key
    ``lm_head``.
    """
    tie = checkpoint.tie
    wanted = {name: Expected(tensor) for name, tensor in checkpoint.tensors.items()}
    head = tie.head or "lm_head"
    if tie.head is None:
        wanted[head] = Expected(checkpoint.tensors[tie.embedding]) if tie.has_head else wanted[tie.embedding]
    for adapter in adapters:
        touched = set()
        for name, part in _named_parts(checkpoint, adapter, head):
            touched.add((name, type(part)))
            _apply(wanted[name], part)
        _follow_tie(checkpoint, adapter, wanted, head, touched)
    grow_tables(checkpoint, adapters, wanted)
    return wanted


def _named_parts(
    checkpoint: Checkpoint, adapter: Adapter, head: str
) -> Iterator[tuple[str, TokenRows | LowRank | FullModule]]:
    """Yield (tensor name, edit) for each stored tensor that an adapter changes; an edit is one change."""
    embedding = checkpoint.tie.embedding
    for part in (*recomputed(checkpoint, adapter), *resized_originals(checkpoint, adapter)):
        copied = isinstance(part, LowRank) or (isinstance(part, FullModule) and not part.in_place)
        if copied and is_never_run(checkpoint, part.module):
            continue
        parameter = "weight" if isinstance(part, TokenRows) else part.parameter
        use = use_of(checkpoint, part.module) if parameter == "weight" else None
        if use is not None:
            yield {EMBEDDING: embedding, HEAD: head}[use], part
            continue
        place = place_of(checkpoint, part.module, parameter, _shape(part))
        if place is None:
            raise BadInput(
                f"{part.path}: {part.key}: expected a module of the base {checkpoint.path}, found {part.module}"
            )
        if isinstance(part, LowRank) and place.module and checkpoint.modules:
            part = replace(part, transposed=checkpoint.modules.architecture.stores_in_out(place.module))
        yield from _by_stored_name(part, place)
        if isinstance(part, LowRank) and part.bias is not None and (at := place_of(checkpoint, part.module, "bias")):
            yield from _by_stored_name(part, at)


def _shape(part: TokenRows | LowRank | FullModule) -> tuple[int, ...] | None:
    if isinstance(part, LowRank) and part.experts > 1:
        return part.experts, part.up.spec.shape[0], part.down.spec.shape[1]
    return part.tensor.spec.shape if isinstance(part, FullModule) else None


def _by_stored_name(
    part: TokenRows | LowRank | FullModule, place: Place
) -> Iterator[tuple[str, TokenRows | LowRank | FullModule]]:
    if place.name is not None:
        yield place.name, part
        return
    for item in place.parts:
        if isinstance(part, LowRank):
            yield item.block.name, replace(part, part=item)
        elif isinstance(part, FullModule):
            from exporter.sources.peft.parts import PartTensor  # a lazy import: few merges need the module

            yield item.block.name, replace(part, tensor=PartTensor.of(part.tensor, item))


def _apply(want: Expected, part: TokenRows | LowRank | FullModule) -> None:
    if isinstance(part, TokenRows):
        for token_id, row in zip(part.token_ids, part.rows, strict=True):
            if token_id in want.rows and not np.array_equal(want.rows[token_id], row):
                raise BadInput(
                    f"{part.path}: {part.key}: expected one trained row for token {token_id}, found two different rows"
                )
            want.rows[token_id] = row
    elif isinstance(part, FullModule):
        want.full = part
    elif len(want.base.spec.shape) == 1:
        want.biases.append(part)
    elif part not in want.updates:
        want.updates.append(part)


def _follow_tie(
    checkpoint: Checkpoint, adapter: Adapter, wanted: dict[str, Expected], head: str, touched: set[tuple[str, type]]
) -> None:
    """If an adapter changes a tied embedding or a tied head, apply the change to all tied tensors.

    If an adapter contains separate trained rows for a tied tensor, the rows of other tensors are not applied to the
    tied tensor.
    """
    tie = checkpoint.tie
    heads = (head, *tie.head_copies)
    names = (tie.embedding, *tie.copies, *(heads if tie.has_head and (tie.tied or tie.tied_in_config) else ()))
    copied = wanted[head].full
    own_head = copied is not None and not copied.in_place
    source = next((name for name in names if (name, TokenRows) in touched), None)
    only_head = source == head and (bool(adapter.config.get("trainable_token_indices")) or _names_head(adapter))
    if source is not None and not only_head:
        own = {token_id for part in adapter.rows for token_id in part.token_ids} & wanted[source].rows.keys()
        followed = {token_id: wanted[source].rows[token_id] for token_id in sorted(own)}
        for name in names:
            if (name, TokenRows) not in touched and not (name == head and own_head):
                wanted[name].rows |= followed
    grown = next((wanted[name].full for name in names if (full := wanted[name].full) and full.in_place), None)
    for name in (tie.embedding, *tie.copies, *(heads if tie.tied else ())):
        if grown is not None and wanted[name].full is None:
            wanted[name].full = grown
    for name in tie.head_copies:
        copied_head = wanted[head]
        wanted[name].full, wanted[name].rows = copied_head.full, dict(copied_head.rows)
        wanted[name].updates = list(copied_head.updates)


def same_values(first: Expected, second: Expected) -> bool:
    """Whether two tensors that are tied in the base, such as embedding and head, have equal expected values."""
    left, right = first.source, second.source
    if left is not right and (left.spec.shape != right.spec.shape or not np.array_equal(read(left), read(right))):
        return False
    if first.rows.keys() != second.rows.keys():
        return False
    if not all(np.array_equal(row, second.rows[token_id]) for token_id, row in first.rows.items()):
        return False
    if any(update.magnitude for update in (*first.updates, *second.updates)):
        return not first.updates and not second.updates
    factors = [[_factors(update) for update in use.updates] for use in (first, second)]
    return len(factors[0]) == len(factors[1]) and all(
        left[0] == right[0] and np.array_equal(left[1], right[1]) and np.array_equal(left[2], right[2])
        for left, right in zip(*factors, strict=True)
    )


def _factors(update: LowRank) -> tuple[float, Array, Array]:
    """Return (scaling, left, right) for a low-rank update scaling · left @ right of the embedding or the head.

    The LoRA factor ``left`` has the shape (vocabulary, rank), and ``right`` has the shape (rank, hidden).
    """
    down, up = read(update.down), read(update.up)
    return (update.scaling, down.T, up.T) if update.target_type == "embedding" else (update.scaling, up, down)


def _names_head(adapter: Adapter) -> bool:
    targets = adapter.config.get("target_modules")
    names = [targets] if isinstance(targets, str) else targets or []
    return bool(names) and all(str(name).rpartition(".")[2] in HEADS for name in names)
