"""Describes unusual properties of an adapter that do not prevent a merge but that the user should know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import Edit, LowRank
from exporter.sources.peft.normal_keys import PREFIX, NormalKeys
from exporter.tensors import blocks


def notes(path: Path, edits: Sequence[Edit], normal: NormalKeys) -> list[str]:
    """Return a sentence for each unusual property of the adapter. path: the adapter file.

    The tensors of a trained adapter are read only up to the first block with a nonzero value.
    """
    lines = []
    if normal.removed:
        parts = ", ".join(normal.removed)
        lines.append(f"{path}: the names of tensors contain {parts}, which is not part of the names of modules")
    if normal.prefixed:
        lines.append(f"{path}: the names of tensors lack PEFT's prefix {PREFIX}")
    if changes_nothing(edits):
        lines.append(f"{path}: the adapter does not change the base, because a factor of every update is zero")
    return lines


def changes_nothing(edits: Sequence[Edit]) -> bool:
    """Whether every edit of the adapter is a low-rank update that leaves the base unchanged, because a factor is zero.

    A DoRA update counts as a change, because the magnitude vector may change the base even if a factor is zero.
    """
    return all(
        isinstance(edit, LowRank)
        and edit.magnitude is None
        and (_is_zero(edit.up) or _is_zero(edit.down))
        and (edit.bias is None or _is_zero(edit.bias))
        for edit in edits
    )


def _is_zero(tensor: FileTensor) -> bool:
    return not any(block.any() for _, block in blocks(tensor))
