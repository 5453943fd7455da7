"""Replaces changes that only PEFT can merge by whole tensors, which PEFT computes when a tensor is first read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from exporter.errors import BadInput
from exporter.merge.assignment import assign
from exporter.packages import PEFT
from exporter.peft_modules.replacements import Replacement, replacements
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import Edit, TokenRows

_PROCESS: Final = "exporter.merge.by_peft.process"


def merged_by_peft(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return copies of ``adapters`` in which tensors merged by PEFT replace all changes that only PEFT can merge.

    PEFT runs in a separate process, which starts when the first tensor is read. Raises BadInput if PEFT merges a module
    that a second adapter also changes, because the result would depend on the order of the adapters. Raises
    MissingDependency if PEFT is not installed.
    """
    PEFT.require("--via peft")
    merged = [
        replace(adapter, edits=replacements(checkpoint, adapter, process=_PROCESS, dtype="F64")) for adapter in adapters
    ]
    if len(merged) > 1:
        _require_alone(checkpoint, merged)
    return merged


def _require_alone(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
    owner: dict[str, Adapter] = {}
    for adapter in adapters:
        owner |= {name: adapter for name, edit in _destinations(checkpoint, adapter) if isinstance(edit, Replacement)}
    for adapter in adapters if owner else ():
        for name, edit in _destinations(checkpoint, adapter):
            if (first := owner.get(name, adapter)) is not adapter:
                raise BadInput(
                    f"{edit.path}: {edit.key}: expected only {first.path} to change {name}, because PEFT merges that "
                    "adapter, found a second adapter; merge the adapters one after the other"
                )


def _destinations(checkpoint: Checkpoint, adapter: Adapter) -> Iterator[tuple[str, Edit]]:
    for edit in adapter.edits:
        if not isinstance(edit, TokenRows):
            yield from ((name, edit) for name in assign(checkpoint, edit))
