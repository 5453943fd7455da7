"""The jobs of a release: every model in every format; each makes one artifact, alone or on a machine of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from exporter.errors import UsageError
from exporter.formats.target import DTYPES, Wish
from exporter.release.spec import ReleaseSpec, gguf_types

#: Options that an unquantised file has no use for.
_QUANTISER: Final = ("token-embedding-type", "output-tensor-type")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One artifact to make. ``name`` is unique in its release; ``storage`` says what it is asked to hold.

    parameters: every option that its bytes depend on, JSON values; paths are not among them, see ``wish``.
    """

    name: str
    model: str
    format: str
    storage: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """Its name as a part of file names."""
        return self.name.replace("/", "-")

    def wish(self) -> Wish:
        """The options as the formats take them, without those that name files."""
        asked = self.parameters
        dtype = asked.get("dtype")
        return Wish(
            dtype=DTYPES[dtype] if dtype else None,
            quants=tuple(asked.get("quants", ())),
            onnx_ops=asked.get("ops", "standard"),
            pre_tokenizer=asked.get("pre-tokenizer"),
            token_embedding_type=asked.get("token-embedding-type"),
            output_tensor_type=asked.get("output-tensor-type"),
        )


def jobs_of(spec: ReleaseSpec) -> list[Job]:
    """All jobs, in the order in which one machine does them: model by model."""
    alone = len(spec.models) == 1
    return [
        Job(
            name=name if alone else f"{model}/{name}",
            model=model,
            format=name.partition("-")[0],
            storage=storage,
            parameters=parameters,
        )
        for model in spec.models
        for name, storage, parameters in _wanted(spec)
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


def _wanted(spec: ReleaseSpec) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, storage, parameters) of every artifact that each model gets."""
    wanted: list[tuple[str, str, dict[str, Any]]] = []
    if spec.hf:
        wanted.append(("hf", spec.hf.dtype or "as stored", _given(dtype=spec.hf.dtype)))
    if spec.gguf:
        table = msgspec.to_builtins(spec.gguf)
        options = {key: value for key, value in table.items() if key not in ("types", "imatrix") and value is not None}
        for kind in gguf_types(spec.gguf):
            own = {"dtype": kind} if kind in DTYPES else {"quants": [kind]}
            used = {key: value for key, value in options.items() if kind not in DTYPES or key not in _QUANTISER}
            wanted.append((f"gguf-{kind}", kind, {**own, **used}))
    if spec.onnx:
        precisions = spec.onnx.precisions
        wanted.append(("onnx", ", ".join(precisions), {"quants": precisions, "ops": spec.onnx.ops}))
    return wanted


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}
