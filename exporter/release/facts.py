"""Data classes for the facts of a release, from which manifest, checksums, provenance, cards and signature are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Material:
    """The base or an adapter. name: a hub id or the name of the folder, never a local path.

    revision: the commit on the hub, or None. files: maps the relative path of every file that was read to the sha256 of
    the file.
    """

    name: str
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An artifact of the release. path: file or folder, as a path below the release folder, with slashes.

    model: a key of ``Release.models``. format, storage: names of format and storage as printed by ``ttexport plan``.
    parameters: the options of the job as JSON values. report: the entry for this artifact in ``report.json``; None if
    the artifact was not verified. notes: the notes of the plan on the artifact.
    """

    job: str
    model: str
    format: str
    storage: str
    path: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Model:
    """A tuned model of the release: the base with adapters.

    folder: folder of the card and the artifacts, below the release folder; empty if the release has only one model.
    card: texts for the card, from ``release.toml``. parameter_count: number of parameters of the merged model.
    size_label: label of the model size for llama.cpp's file names, such as ``135M``.
    """

    name: str
    adapters: tuple[str, ...]
    folder: str = ""
    parameter_count: int = 0
    size_label: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Release:
    """The facts about a whole release.

    tools: maps each package to its version, and ``llama.cpp build`` to the digest of llama.cpp's libraries. The facts
    contain no clock time, host name or local path, so two runs of the same release have equal facts.
    """

    name: str
    version: str
    base: Material
    adapters: Mapping[str, Material]
    models: Mapping[str, Model]
    artifacts: tuple[Artifact, ...]
    tools: Mapping[str, str]
    spec: Mapping[str, Any]  # release.toml as it was parsed; each path is replaced by a name


@dataclass(frozen=True, kw_only=True)
class Run:
    """The facts that ``run.json`` stores about one run of a release, such as times, which differ in the next run."""

    started: str  # RFC 3339, UTC
    finished: str
    invocation: str  # a UUID
    host: Mapping[str, str] = field(default_factory=dict)
    jobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # job → seconds, method
