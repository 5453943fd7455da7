"""Plan a release: determine the input digests, jobs, artifacts and sizes before any artifact is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from exporter.export.inputs import (
    adapter_files,
    checkpoint_files,
    merge_files,
    open_adapters,
    option_files,
    plan_located_merge,
)
from exporter.formats.table import FORMATS, plan_target
from exporter.formats.target import FormatOptions, Target
from exporter.io.digests import FileDigests, digest_of
from exporter.merge.plan import MergePlan
from exporter.release.facts import Material, Model, Release
from exporter.release.jobs import Job, jobs_of
from exporter.release.making.store import Cache
from exporter.release.making.tools import source_digest, tools
from exporter.release.names import artifact_place, label, model_folder, model_title
from exporter.release.spec import ReleaseSpec
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.locate import Located, locate
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import TokenRows
from exporter.verify.request import require_verifiable

#: File name in error messages if the caller gives no file name.
FILE: Final = Path("release.toml")


@dataclass(frozen=True)
class ModelPlan:
    """One model of the release. folder: path of the model's folder below the release.

    adapters: names of the model's adapters, as keys of the release's adapters. adapter_sources: each adapter as an
    argument of ``ttexport patch``, which is a path or a hub id with its commit.
    """

    name: str
    folder: str
    adapters: tuple[str, ...]
    adapter_sources: tuple[str, ...]
    merge: MergePlan
    parameter_count: int

    @property
    def rows_only(self) -> bool:
        """Whether the adapters change only token rows, so that artifacts of the base can be patched."""
        edits = [edit for adapter in self.merge.adapters for edit in adapter.edits]
        return bool(edits) and all(isinstance(edit, TokenRows) for edit in edits)


@dataclass(frozen=True)
class ReleasePlan:
    """The plan of a whole release.

    base: plan for writing the base without adapters; the artifacts written from this plan are patched with token rows.
    """

    spec: ReleaseSpec
    jobs: Sequence[Job]
    base: MergePlan
    models: Mapping[str, ModelPlan]
    targets: Mapping[str, Target]  # job → target
    facts: Release  # the facts without artifacts
    digests: FileDigests
    prompts: tuple[str, ...]
    cache: Cache | None

    @cached_property
    def inputs(self) -> set[Path]:
        """The paths of all input files that are read to make the release."""
        merges = [self.base, *(model.merge for model in self.models.values())]
        return option_files(self.spec.formats, self.spec.verify).union(*map(merge_files, merges))

    @property
    def nbytes(self) -> int:
        """Total size of all artifacts in bytes, estimated for artifacts whose size is not known exactly in advance."""
        return sum(target.nbytes for target in self.targets.values())

    def recipe(self, merge: MergePlan, options: FormatOptions, **more: Any) -> dict[str, Any]:
        """Return, as JSON values, all values that determine the bytes of an artifact."""
        return {
            "format": options.section,
            "parameters": options.changed(),
            "option files": self._digests(options.recipe_files()),
            "untie": self.spec.merge.untie,
            "dropped tokens": list(merge.dropped_tokens),
            "base": self.facts.base.name,
            "files": self._digests(checkpoint_files(merge.checkpoint)),
            "adapters": [self._digests(adapter_files(adapter)) for adapter in merge.adapters],
            "origins": dict(merge.origins),
            "tools": dict(self.facts.tools),
            "source": source_digest(),
            **more,
        }

    def key(self, job: Job) -> str:
        """Return the digest of the job's name, its output path and all values that determine the bytes of its artifact.

        The digest is the key of the job: a finished job need not be repeated if its key is unchanged. The key of a job
        does not depend on the options for verification.
        """
        recipe = self.recipe(self.models[job.model].merge, job.options)
        return digest_of(json.dumps([job.name, self.place(job), recipe], sort_keys=True).encode())

    def verifications(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Map each model with a job in ``jobs`` to the digest of the settings with which its artifacts are verified.

        Empty at level ``off``. A verification need not be repeated if the digest of the model's settings and the keys
        of its jobs are unchanged.
        """
        options = self.spec.verify
        if options.level == "off":
            return {}
        digest = digest_of(json.dumps([options.level, sorted(options.require), self.prompts]).encode())
        return {job.model: digest for job in jobs}

    def place(self, job: Job) -> str:
        """Return the path of the job's artifact relative to the release folder, with slashes."""
        parameters = self.models[job.model].parameter_count
        return artifact_place(self.spec, job, self.targets[job.name].storage, parameters)

    def _digests(self, files: Mapping[str, Path]) -> dict[str, str]:
        return {name: self.digests.of(path) for name, path in files.items()}


def plan_release(
    spec: ReleaseSpec, *, cache: Cache | None = None, quiet: bool = True, asked_by: Path = FILE
) -> ReleasePlan:
    """Locate and hash the inputs, and plan every artifact from tensor shapes without reading tensor data.

    cache: cache that is kept between releases; None disables the cache. quiet: show no progress bars during downloads.
    asked_by: name of the file that ``spec`` was read from, used in error messages. Raises BadInput if an input is
    unusable, NotExpressible if a format cannot represent an artifact, and MissingDependency if a required runtime is
    not installed.
    """
    prompts = tuple(require_verifiable(spec.verify, needed_for="verify.require"))
    digests = FileDigests(cache.digests if cache else None)
    base = locate(spec.base, asked_by=f"{asked_by}: base", content="checkpoint", quiet=quiet)
    checkpoint = Checkpoint.open(base.path)
    plain = plan_located_merge(base, checkpoint, [], spec.merge)
    models: dict[str, ModelPlan] = {}
    materials: dict[str, Material] = {}
    for name, table in spec.models.items():
        adapters = open_adapters(
            table.adapters, spec.merge, asked_by=f"{asked_by}: models.{name}.adapters", quiet=quiet
        )
        merge = plan_located_merge(base, checkpoint, adapters, spec.merge)
        models[name] = ModelPlan(
            name=name,
            folder=model_folder(spec, name),
            adapters=tuple(_add_material(materials, source, adapter, digests) for source, adapter in adapters),
            adapter_sources=tuple(_argument(source) for source, _ in adapters),
            merge=merge,
            parameter_count=_parameters(merge),
        )
    jobs = jobs_of(spec)
    targets = _plan_targets(spec, jobs, plain, models)
    facts = _facts(spec, base, plain, models, materials, digests)
    return ReleasePlan(spec, jobs, plain, models, targets, facts, digests, prompts, cache)


def _plan_targets(
    spec: ReleaseSpec, jobs: Sequence[Job], base: MergePlan, models: Mapping[str, ModelPlan]
) -> dict[str, Target]:
    """Map each job to the plan of its artifact.

    If an artifact will be made by patching an artifact of the base, its plan is the plan of the base's artifact.
    """
    shared: dict[str, Target] = {}
    targets = {}
    for job in jobs:
        model = models[job.model]
        if model.rows_only and FORMATS[job.format].patchable:
            key = json.dumps([job.format, job.parameters], sort_keys=True)
            target = shared.get(key) or plan_target(job.options, base, spec.merge.budget)
            shared[key] = target
        else:
            target = plan_target(job.options, model.merge, spec.merge.budget)
        if target.refusal:
            raise target.refusal
        targets[job.name] = target
    return targets


def _argument(source: Located) -> str:
    return f"{source.repo}@{source.revision}" if source.repo else str(source.path)


def _add_material(materials: dict[str, Material], source: Located, adapter: Adapter, digests: FileDigests) -> str:
    """Add an adapter to ``materials``, the inputs of the release, and return the key under which it was added.

    The key is the name of the adapter, followed by a number if a different adapter already has that name.
    """
    material = _material(source, adapter_files(adapter), digests)
    key, number = source.name, 1
    while key in materials and materials[key] != material:
        number += 1
        key = f"{source.name}-{number}"
    materials[key] = material
    return key


def _material(source: Located, files: Mapping[str, Path], digests: FileDigests) -> Material:
    digests_by_name = dict(zip(files, digests.of_all(files.values()).values(), strict=True))
    return Material(name=source.repo or source.name, revision=source.revision, files=digests_by_name)


def _facts(
    spec: ReleaseSpec,
    base: Located,
    plain: MergePlan,
    models: Mapping[str, ModelPlan],
    adapters: Mapping[str, Material],
    digests: FileDigests,
) -> Release:
    material = _material(base, checkpoint_files(plain.checkpoint), digests)
    recorded = recorded_spec(spec, material.name, {name: model.adapters for name, model in models.items()})
    return Release(
        name=spec.name,
        version=spec.version,
        base=material,
        adapters=adapters,
        models={
            name: Model(
                name=model_title(spec, name),
                adapters=model.adapters,
                folder=model.folder,
                parameter_count=model.parameter_count,
                size_label=label(model.parameter_count),
                card={**spec.card, **spec.models[name].card},
            )
            for name, model in models.items()
        },
        artifacts=(),
        tools=tools(digests),
        spec=recorded,
    )


def recorded_spec(spec: ReleaseSpec, base: str, adapters: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the parsed content of ``release.toml``, with every path replaced by a name.

    adapters: maps each model to the names of its adapters.
    """
    recorded = {**spec.to_json(), "base": base}
    for name, keys in adapters.items():
        recorded["models"][name]["adapters"] = list(keys)
    return recorded


def _parameters(merge: MergePlan) -> int:
    """Return the number of parameters of the merged model. Tied tensors count once."""
    duplicates = merge.tie.duplicates
    return sum(math.prod(spec.shape) for name, spec in merge.model().specs.items() if name not in duplicates)
