"""The jobs of a release: every model in every format; each makes one artifact, alone or on a machine of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import UsageError
from exporter.formats.target import FormatOptions
from exporter.release.spec import ReleaseSpec


@dataclass(frozen=True, kw_only=True)
class Job:
    """One artifact to make. ``name`` is unique in its release; options: of this artifact alone."""

    name: str
    model: str
    options: FormatOptions

    @property
    def format(self) -> str:
        """The format of its artifact."""
        return self.options.section

    @property
    def storage(self) -> str:
        """What is asked for: a dtype, a quantisation, precisions."""
        return self.options.label

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Every option that differs from its default, as JSON values; files by their names."""
        return self.options.changed()

    @property
    def slug(self) -> str:
        """Its name as a part of file names."""
        return self.name.replace("/", "-")


def jobs_of(spec: ReleaseSpec) -> list[Job]:
    """All jobs, in the order in which one machine does them: model by model."""
    alone = len(spec.models) == 1
    wanted = [
        (f"{group.section}-{options.label}" if options is not group else group.section, options)
        for group in spec.formats
        for options in group.artifacts()
    ]
    return [
        Job(name=name if alone else f"{model}/{name}", model=model, options=options)
        for model in spec.models
        for name, options in wanted
    ]


def find_job(jobs: Sequence[Job], name: str) -> Job:
    """The job of that name. Raises UsageError."""
    for job in jobs:
        if job.name == name:
            return job
    raise UsageError(f"--only: expected one of {', '.join(job.name for job in jobs)}, found {name!r:.80}")


def matrix(jobs: Sequence[Job]) -> dict[str, Any]:
    """What a CI system's matrix takes: an entry a job; ``piece`` names the folder that carries its result."""
    return {
        "include": [
            {"job": job.name, "piece": job.slug, "model": job.model, "format": job.format, "storage": job.storage}
            for job in jobs
        ]
    }
