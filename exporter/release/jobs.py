"""List the jobs of a release. Each job makes one artifact, which is one model in one format.

The jobs of a release can run separately on different machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import NotExpressible, UsageError
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.target import FormatOptions
from exporter.release.spec import ReleaseSpec


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job, which makes one artifact of a release. name: name of the job, unique within the release.

    options: the options of the artifact's format, with the values for this artifact only.
    """

    name: str
    model: str
    options: FormatOptions

    @property
    def format(self) -> str:
        """The name of the artifact's format."""
        return self.options.section

    @property
    def storage(self) -> str:
        """The requested storage of the artifact: a dtype, a quantisation type, or the precisions of an ONNX model."""
        return self.options.label

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Every option of the job that differs from the option's default, as JSON values.

        A file path among the options is replaced by the name of the file.
        """
        return self.options.changed()

    @property
    def slug(self) -> str:
        """The name of the job, converted so that the name is valid as a file name."""
        return self.name.replace("/", "-")


def jobs_of(spec: ReleaseSpec) -> list[Job]:
    """Return all jobs in the order in which a single machine runs them: one model after the other.

    Raises NotExpressible if a file with encoders is requested, because each artifact of a release is a model.
    """
    if any(isinstance(options, GgufOptions) and options.mmproj for options in spec.formats):
        reason = "a release contains models, and this file contains the encoders of images and sounds alone"
        raise NotExpressible("release: gguf.mmproj", reason, instead="write the file with ttexport merge --mmproj")
    single_model = len(spec.models) == 1
    artifacts = [
        (f"{group.section}-{options.label}" if options is not group else group.section, options)
        for group in spec.formats
        for options in group.artifacts()
    ]
    return [
        Job(name=name if single_model else f"{model}/{name}", model=model, options=options.as_released())
        for model in spec.models
        for name, options in artifacts
    ]


def find_job(jobs: Sequence[Job], name: str) -> Job:
    """The job named ``name``. Raises UsageError if no job has the given name."""
    for job in jobs:
        if job.name == name:
            return job
    raise UsageError(f"--only: expected one of {', '.join(job.name for job in jobs)}, found {name!r:.80}")


def matrix(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return the job matrix for a CI system, with one entry per job.

    In each entry, the value of ``piece`` is the name of the folder for the piece that the job makes.
    """
    return {
        "include": [
            {"job": job.name, "piece": job.slug, "model": job.model, "format": job.format, "storage": job.storage}
            for job in jobs
        ]
    }
