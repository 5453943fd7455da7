"""Compute the expected weights of modules by running PEFT's layers, if only PEFT can apply the adapter type.

PEFT's layers run unmerged on unit vectors, so that a bug in the merge code of PEFT or ttexport cannot affect the
expected weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Final

from exporter.peft_modules.replacements import Replacement, replacements
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import FullModule, LowRank, TokenRows
from exporter.sources.peft.types.changes import ByPeft

_PROCESS: Final = "exporter.verify.by_peft.process"


class Recomputed(FullModule):
    """A whole tensor of the tuned model, which PEFT's layers compute from the base and the adapter."""

    __slots__ = ()


def recomputed(checkpoint: Checkpoint, adapter: Adapter) -> Iterator[TokenRows | LowRank | FullModule]:
    """Yield the adapter's changes of tensors; a ``Recomputed`` tensor replaces each change that only PEFT can apply."""
    if not any(isinstance(edit, ByPeft) for edit in adapter.edits):
        yield from (edit for edit in adapter.edits if not isinstance(edit, ByPeft))
        return
    for edit in replacements(checkpoint, adapter, process=_PROCESS, dtype="F64"):
        if isinstance(edit, Replacement):
            yield _recomputed(edit)
            if edit.bias is not None:
                yield _recomputed(edit.bias)
        elif not isinstance(edit, ByPeft):
            yield edit


def _recomputed(whole: FullModule) -> Recomputed:
    return Recomputed(*(getattr(whole, entry.name) for entry in fields(FullModule)))
