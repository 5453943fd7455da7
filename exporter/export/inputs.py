"""Prepare the inputs of exports and releases: open the adapters, plan the merge, and list every input file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from exporter.export.spec import MergeOptions
from exporter.formats.target import FormatOptions
from exporter.merge.by_peft.adapters import merged_by_peft
from exporter.merge.plan import MergePlan, plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.base_check import check_base
from exporter.sources.hub.locate import Located, locate, origins
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.folders import CONFIG
from exporter.sources.peft.types.changes import ByPeft
from exporter.verify.expect.reference import Reference
from exporter.verify.options import VerifyOptions

_INDEX: Final = "model.safetensors.index.json"


class LocatedAdapter(NamedTuple):
    """An opened adapter and its source: the local path and, if the adapter was downloaded, the hub repository."""

    source: Located
    adapter: Adapter


def open_adapters(
    sources: Iterable[Path | str], options: MergeOptions, *, asked_by: str, quiet: bool
) -> list[LocatedAdapter]:
    """Open adapters that are given as paths or hub ids. An adapter is downloaded first if necessary.

    asked_by: name of the argument or key that lists the adapters, for error messages. quiet: whether to hide progress
    bars of downloads. Raises BadInput if an adapter is not found or is damaged, and NotExpressible if its type cannot
    be merged with ``options``.
    """
    located = [locate(str(source), asked_by=asked_by, content="adapter", quiet=quiet) for source in sources]
    via_peft = options.via == "peft"
    return [LocatedAdapter(source, Adapter.open(source.path, via_peft=via_peft)) for source in located]


def plan_located_merge(
    base: Located, checkpoint: Checkpoint, adapters: Sequence[LocatedAdapter], options: MergeOptions
) -> MergePlan:
    """Check that the adapters belong to ``base``, plan the merge, and record the hub repositories of all inputs.

    checkpoint: the opened checkpoint of ``base``.

    Raises BadInput if an adapter does not fit ``base``, NotExpressible if ttexport cannot merge an adapter, and
    MissingDependency if only PEFT can merge an adapter but PEFT is not installed.
    """
    opened = [adapter for _, adapter in adapters]
    warnings = check_base(base, checkpoint, opened, untie=options.untie, trust=options.trust_base)
    if any(isinstance(edit, ByPeft) for adapter in opened for edit in adapter.edits):
        opened = merged_by_peft(checkpoint, opened)
    merge = plan_merge(checkpoint, opened, untie=options.untie, drop_unused=options.drop_unused_tokens)
    return replace(
        merge, origins=origins(base, [source for source, _ in adapters]), warnings=[*warnings, *merge.warnings]
    )


def checkpoint_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Map file names to paths, for all files of the checkpoint that a merge reads."""
    paths = {tensor.place.path for tensor in checkpoint.tensors.values()} | set(checkpoint.auxiliary_files.values())
    paths.add(checkpoint.path / "config.json")
    if (index := checkpoint.path / _INDEX).is_file():
        paths.add(index)
    return {path.relative_to(checkpoint.path).as_posix(): path for path in sorted(paths)}


def adapter_files(adapter: Adapter) -> dict[str, Path]:
    """Map file names to paths, for all files of the adapter that a merge reads."""
    paths = {adapter.path / CONFIG, adapter.weights, *adapter.auxiliary_files.values()}
    return {path.relative_to(adapter.path).as_posix(): path for path in sorted(paths)}


def merge_files(merge: MergePlan) -> set[Path]:
    """Return the paths of all files of the base and the adapters that the merge reads."""
    files = set(checkpoint_files(merge.checkpoint).values())
    return files.union(*(adapter_files(adapter).values() for adapter in merge.adapters))


def option_files(formats: Iterable[FormatOptions], verify: VerifyOptions) -> set[Path]:
    """Return the paths of all input files given as options, such as an importance matrix or a file of prompts."""
    prompts = {verify.prompts} if verify.prompts else set()
    return prompts.union(*(options.files().values() for options in formats))


def reference_of(merge: MergePlan, *, untie: bool) -> Reference:
    """Open the base and the adapters of ``merge`` as the unmerged reference with which artifacts are compared."""
    adapters = [adapter.path for adapter in merge.adapters]
    return Reference.open(merge.checkpoint.path, adapters, untie=untie, drop_unused=bool(merge.dropped_tokens))
