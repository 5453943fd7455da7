"""What a finished release is: what the jobs hand to manifest, checksums, provenance, card and signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Material:
    """Something that went in. ``name``: a hub id or the folder's name, never a path of the machine.

    revision: the hub's commit, where there is one. files: name below the folder → sha256, of all that was read.
    """

    name: str
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One thing that came out, verified. ``path``: below the release folder, with slashes; a file or a folder.

    model: which of the release's models it is (a key of ``Release.models``). format, storage: as in ``ttexport plan``.
    parameters: what was asked for (job's options), JSON values. report: that artifact's part of ``report.json``.
    """

    job: str
    model: str
    format: str
    storage: str
    path: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A tuned model of the release: base plus adapters, and where its card and artifacts lie.

    folder: below the release folder, empty where the release holds one model. card: texts of ``release.toml`` for it.
    parameter_count: of the merged model; size_label as llama.cpp's file names want it, such as ``135M``.
    """

    name: str
    adapters: tuple[str, ...]
    folder: str = ""
    parameter_count: int = 0
    size_label: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Release:
    """All of it. base and adapters are materials; tools: package → version, the quantiser's build among them.

    No clock time, host or path is in here: two runs of the same release have equal facts.
    """

    name: str
    version: str
    base: Material
    adapters: Mapping[str, Material]
    models: Mapping[str, Model]
    artifacts: tuple[Artifact, ...]
    tools: Mapping[str, str]
    spec: Mapping[str, Any]  # release.toml as it was understood, paths replaced by names


@dataclass(frozen=True, kw_only=True)
class Run:
    """What differs between two runs of one release: kept in ``run.json``, the only file that may differ."""

    started: str  # RFC 3339, UTC
    finished: str
    invocation: str  # a UUID
    host: Mapping[str, str] = field(default_factory=dict)
    jobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # job → seconds, method
