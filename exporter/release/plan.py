"""From ``release.toml`` to everything that is known before a byte is written: inputs, jobs, refusals, sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from exporter.formats.table import FORMATS, plan_target
from exporter.formats.target import FormatOptions, Target
from exporter.io.digests import FileDigests, digest_of
from exporter.merge.plan import MergePlan, plan_merge
from exporter.release.facts import Material, Model, Release
from exporter.release.jobs import Job, jobs_of
from exporter.release.making.store import Cache
from exporter.release.making.tools import source_digest, tools
from exporter.release.names import artifact_place, label, model_folder, model_title
from exporter.release.spec import ReleaseSpec
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.locate import Located, locate, origins
from exporter.sources.peft.adapter import CONFIG, Adapter
from exporter.sources.peft.edits import TokenRows
from exporter.verify.reports.write import require_renderers
from exporter.verify.running.prompts import read_prompts
from exporter.verify.runtimes.installed import require

#: What errors name where nobody said which file a release is from.
FILE: Final = Path("release.toml")
_INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelPlan:
    """One model of the release. adapters: their names among the release's materials. place: below the release.

    words: each adapter as a command would name it, with the commit of the hub where it came from there.
    """

    name: str
    place: str
    adapters: tuple[str, ...]
    words: tuple[str, ...]
    merge: MergePlan
    parameter_count: int

    @property
    def rows_only(self) -> bool:
        """Whether the adapters hold nothing but token rows, so that artifacts of the base can be patched."""
        parts = [part for adapter in self.merge.adapters for part in adapter.edits]
        return bool(parts) and all(isinstance(part, TokenRows) for part in parts)


@dataclass(frozen=True)
class ReleasePlan:
    """The whole release. base: its artifacts without any adapter, which patches start from."""

    spec: ReleaseSpec
    jobs: Sequence[Job]
    base: MergePlan
    models: Mapping[str, ModelPlan]
    targets: Mapping[str, Target]  # by job
    facts: Release  # without artifacts
    digests: FileDigests
    prompts: tuple[str, ...]
    cache: Cache | None

    @cached_property
    def inputs(self) -> set[Path]:
        """Every file that is read."""
        found = {path for one in (self.base, *(model.merge for model in self.models.values())) for path in _files(one)}
        extra = [path for options in self.spec.formats for path in options.files().values()]
        return found | {*extra, *([self.spec.verify.prompts] if self.spec.verify.prompts else [])}

    @property
    def nbytes(self) -> int:
        """About the bytes of all artifacts."""
        return sum(target.nbytes for target in self.targets.values())

    def recipe(self, merge: MergePlan, options: FormatOptions, **more: Any) -> dict[str, Any]:
        """All that the bytes of an artifact depend on, when it is made from ``merge`` with ``options``."""
        return {
            "format": options.section,
            "parameters": options.changed(),
            "option files": self._digests(options.files()),
            "untie": self.spec.merge.untie,
            "base": self.facts.base.name,
            "files": self._digests(checkpoint_files(merge.checkpoint)),
            "adapters": [self._digests(adapter_files(adapter)) for adapter in merge.adapters],
            "origins": dict(merge.origins),
            "tools": dict(self.facts.tools),
            "source": source_digest(),
            **more,
        }

    def key(self, job: Job) -> str:
        """Tells whether a finished job is still the one that is wanted, however it is verified."""
        parts = [job.name, self.place(job), self.recipe(self.models[job.model].merge, job.options)]
        return digest_of(json.dumps(parts, sort_keys=True).encode())

    def verifications(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Model → digest of how the artifacts of ``jobs`` are verified; none where nothing is verified.

        With the keys of a model's jobs it tells whether a verification is still the one that is wanted.
        """
        wanted = self.spec.verify
        if wanted.level == "off":
            return {}
        digest = digest_of(json.dumps([wanted.level, sorted(wanted.require), self.prompts]).encode())
        return {job.model: digest for job in jobs}

    def place(self, job: Job) -> str:
        """Where the artifact of ``job`` lies below the release, with slashes."""
        parameters = self.models[job.model].parameter_count
        return artifact_place(self.spec, job, self.targets[job.name].storage, parameters)

    def _digests(self, files: Mapping[str, Path]) -> dict[str, str]:
        return {name: self.digests.of(path) for name, path in files.items()}


def plan_release(
    spec: ReleaseSpec, *, cache: Cache | None = None, quiet: bool = True, asked_by: Path = FILE
) -> ReleasePlan:
    """Find the inputs, hash them, and lay out every artifact; shapes only.

    cache: what is kept from release to release; None keeps nothing. quiet: no bars while something is fetched.
    asked_by: the file that ``spec`` was read from, for errors to name.
    Raises BadInput for inputs that cannot be used, NotExpressible for a job that its format cannot do,
    MissingDependency for a runtime that is required.
    """
    require(spec.verify.require, needed_for="verify.require")
    if spec.verify.report:
        require_renderers()
    digests = FileDigests(cache.digests if cache else None)
    base = locate(spec.base, asked_by=f"{asked_by}: base", content="checkpoint", quiet=quiet)
    checkpoint = Checkpoint.open(base.path)
    plain = replace(plan_merge(checkpoint, [], untie=spec.merge.untie), origins=origins(base, []))
    models: dict[str, ModelPlan] = {}
    materials: dict[str, tuple[Located, Material]] = {}
    for name, wanted in spec.models.items():
        where = f"{asked_by}: models.{name}.adapters"
        located = [locate(word, asked_by=where, content="adapter", quiet=quiet) for word in wanted.adapters]
        adapters = [Adapter.open(one.path) for one in located]
        merge = replace(plan_merge(checkpoint, adapters, untie=spec.merge.untie), origins=origins(base, located))
        keys = [_book(materials, one, adapter, digests) for one, adapter in zip(located, adapters, strict=True)]
        words = [f"{one.repo}@{one.revision}" if one.repo else str(one.path) for one in located]
        place = model_folder(spec, name)
        models[name] = ModelPlan(name, place, tuple(keys), tuple(words), merge, _parameters(merge))
    jobs = jobs_of(spec)
    targets = _plan_targets(spec, jobs, plain, models)
    facts = _facts(spec, base, plain, models, {key: material for key, (_, material) in materials.items()}, digests)
    prompts = tuple(read_prompts(spec.verify.prompts)) if spec.verify.prompts else ()
    return ReleasePlan(spec, jobs, plain, models, targets, facts, digests, prompts, cache)


def _plan_targets(
    spec: ReleaseSpec, jobs: Sequence[Job], base: MergePlan, models: Mapping[str, ModelPlan]
) -> dict[str, Target]:
    """Job → how its format lays it out; models that only patch rows share the base's layout."""
    shared: dict[str, Target] = {}
    found = {}
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
        found[job.name] = target
    return found


def checkpoint_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Name → path of every file of the checkpoint that a release reads."""
    paths = {tensor.place.path for tensor in checkpoint.tensors.values()} | set(checkpoint.auxiliary_files.values())
    paths.add(checkpoint.path / "config.json")
    if (index := checkpoint.path / _INDEX).is_file():
        paths.add(index)
    return {path.relative_to(checkpoint.path).as_posix(): path for path in sorted(paths)}


def adapter_files(adapter: Adapter) -> dict[str, Path]:
    """Name → path of every file of the adapter that a release reads."""
    paths = {adapter.path / CONFIG, adapter.weights, *adapter.auxiliary_files.values()}
    return {path.relative_to(adapter.path).as_posix(): path for path in sorted(paths)}


def _files(merge: MergePlan) -> Iterable[Path]:
    yield from checkpoint_files(merge.checkpoint).values()
    for adapter in merge.adapters:
        yield from adapter_files(adapter).values()


def _book(
    materials: dict[str, tuple[Located, Material]], located: Located, adapter: Adapter, digests: FileDigests
) -> str:
    """The adapter's name among the materials; two of one name in different places are told apart by a number."""
    files = adapter_files(adapter)
    held = dict(zip(files, digests.of_all(files.values()).values(), strict=True))
    material = Material(name=located.repo or located.name, revision=located.revision, files=held)
    key, number = located.name, 1
    while key in materials and materials[key][1] != material:
        number += 1
        key = f"{located.name}-{number}"
    materials[key] = (located, material)
    return key


def _facts(
    spec: ReleaseSpec,
    base: Located,
    plain: MergePlan,
    models: Mapping[str, ModelPlan],
    adapters: Mapping[str, Material],
    digests: FileDigests,
) -> Release:
    files = checkpoint_files(plain.checkpoint)
    held = dict(zip(files, digests.of_all(files.values()).values(), strict=True))
    recorded = recorded_spec(spec, base.repo or base.name, {name: model.adapters for name, model in models.items()})
    return Release(
        name=spec.name,
        version=spec.version,
        base=Material(name=base.repo or base.name, revision=base.revision, files=held),
        adapters=adapters,
        models={
            name: Model(
                name=model_title(spec, name),
                adapters=model.adapters,
                folder=model.place,
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
    """``release.toml`` as it was understood, with names in place of paths. adapters: of each model."""
    recorded = {**spec.to_json(), "base": base}
    for name, keys in adapters.items():
        recorded["models"][name]["adapters"] = list(keys)
    return recorded


def _parameters(merge: MergePlan) -> int:
    """Of the merged model; what is tied counts once."""
    duplicates = merge.tie.duplicates
    return sum(math.prod(spec.shape) for name, spec in merge.model().specs.items() if name not in duplicates)
