"""The format of manifest.json, which contains all facts about a release except the facts in run.json (time, machine).

The other documents of a release are rendered from manifest.json and checked against manifest.json. ``python -m
exporter.release.documents.manifest`` writes the JSON schema of the manifest, ``manifest.schema.json``. A manifest has
exactly one canonical form: sorted keys, two spaces of indentation, and a newline at the end of the file. Every manifest
that ttexport writes has the canonical form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from exporter.errors import BadInput, UnreadableFile
from exporter.io.files import read_file
from exporter.io.json_objects import parse_object
from exporter.release.facts import Artifact, Material, Model, Release

NAME: Final = "manifest.json"
#: Incremented when a key is removed or changes its meaning.
SCHEMA: Final = 2
#: Size limit of a manifest. 60,000 tensors, as in the largest mixtures of experts, take 7 MB per format.
_MAX_BYTES: Final = 48 << 20

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, msgspec.Meta(ge=0)]
_Document = TypeVar("_Document")


class MaterialEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input of the release: the base or an adapter.

    name: a hub id or a folder name. revision: the commit on the hub, or null. files: maps the name of every file that
    was read to the sha256 of the file.
    """

    name: str
    revision: str | None
    files: dict[str, Sha256]


class CardEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The texts from ``release.toml`` for a model card: front matter with the hub's key names, and paragraphs."""

    language: str | list[str] | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: list[str] | None = None
    tags: list[str] | None = None
    pipeline_tag: str | None = None
    summary: str | None = None
    use: str | None = None
    limits: str | None = None
    training: str | None = None
    evaluation: str | None = None
    citation: str | None = None


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tuned model of the release.

    adapters: names of the model's adapters. folder: folder of the model, or an empty text if the model is in the
    release folder itself. card: texts of the model card.
    """

    name: str
    adapters: list[str]
    folder: str
    parameter_count: Size
    size_label: str
    card: CardEntry


class CheckEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of one check of the verification.

    value, limit: measured value and limit; null for a yes-or-no check. A value of NaN or infinity is stored as text.
    """

    name: str
    passed: bool
    value: float | str | None
    limit: float | str | None


class SkipEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the verification that was skipped, and the reason for skipping."""

    name: str
    reason: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of verifying an artifact. facts: measured values that are not compared with a limit."""

    level: str
    passed: bool
    checks: list[CheckEntry]
    skipped: list[SkipEntry]
    facts: dict[str, float | str | None]


class ArtifactEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An artifact of the release. path: a file or a folder, as a path relative to the release folder.

    notes: the notes of the plan on the artifact.
    """

    job: str
    model: str
    format: str
    storage: str
    path: str
    parameters: dict[str, Any]
    verdict: Verdict | None
    notes: list[str] = []


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the release.

    tensors: maps the name of each tensor in the file to the sha256 of the tensor's stored bytes; empty for a file
    without tensors.
    """

    path: str
    kind: str
    size: Size
    sha256: Sha256
    tensors: dict[str, Sha256]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole manifest of a release.

    tools: maps each package to its version, and "llama.cpp build" to the digest of llama.cpp's libraries.
    """

    schema: Literal[2]
    kind: Literal["ttexport release"]
    name: str
    version: str
    base: MaterialEntry
    adapters: dict[str, MaterialEntry]
    models: dict[str, ModelEntry]
    artifacts: list[ArtifactEntry]
    tools: dict[str, str]
    spec: dict[str, Any]
    files: list[FileEntry]


def build(release: Release, files: Sequence[FileEntry]) -> Manifest:
    """Build the manifest of ``release``. files: all files except the documents that are rendered from the manifest.

    Raises BadInput if a manifest cannot represent the release, for example because a card has texts with unknown keys.
    """
    document = {
        "schema": SCHEMA,
        "kind": "ttexport release",
        "name": release.name,
        "version": release.version,
        "base": _material(release.base),
        "adapters": {name: _material(adapter) for name, adapter in release.adapters.items()},
        "models": {key: _model(model) for key, model in release.models.items()},
        "artifacts": [_artifact(artifact) for artifact in sorted(release.artifacts, key=lambda a: (a.path, a.job))],
        "tools": dict(release.tools),
        "spec": dict(release.spec),
        "files": [msgspec.to_builtins(file) for file in sorted(files, key=lambda file: file.path)],
    }
    # The result is passed through JSON once: tuples become lists and integers floats, as in a manifest read from
    # disk.
    try:
        return msgspec.json.decode(msgspec.json.encode(document), type=Manifest)
    except msgspec.ValidationError as exc:
        raise BadInput(f"{release.name}: {NAME} cannot represent the facts of this release: {exc}") from exc


def card_texts(table: Mapping[str, Any], where: str) -> CardEntry:
    """Parse ``table``, a table of card texts in ``release.toml``.

    Raises BadInput if a key is unknown or a value is invalid; the message begins with ``where``, the name of the table.
    """
    try:
        return msgspec.convert(dict(table), CardEntry)
    except msgspec.ValidationError as exc:
        raise BadInput(f"{where}: {exc}") from exc


def to_bytes(document: object) -> bytes:
    """Encode ``document`` (a struct or JSON values) as indented JSON with sorted keys and a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(document, order="deterministic"), indent=2) + b"\n"


def read(path: Path) -> tuple[Manifest, bytes]:
    """Read the manifest at ``path`` and return the parsed manifest and the bytes of the file.

    Any JSON formatting is accepted: the order of the keys and the indentation are not checked. Raises UnreadableFile if
    the file is not a manifest or has another schema version, if the manifest refers to unknown models or adapters, or
    if the manifest contains a path outside of the manifest's folder.
    """
    content = read_file(path, max_nbytes=_MAX_BYTES)
    manifest = decode(path, content, Manifest)
    folders = [model.folder for model in manifest.models.values() if model.folder]
    paths = [artifact.path for artifact in manifest.artifacts] + [file.path for file in manifest.files]
    for place in folders + paths:
        if not is_inside(place):
            raise UnreadableFile(path, f"expected paths below the release folder, found {place!r:.80}")
    if unknown := {artifact.model for artifact in manifest.artifacts} - manifest.models.keys():
        raise UnreadableFile(
            path, f"an artifact belongs to the model {min(unknown)!r:.80}, which the manifest does not define"
        )
    if unknown := {name for model in manifest.models.values() for name in model.adapters} - manifest.adapters.keys():
        raise UnreadableFile(
            path,
            f"a model uses the adapter {min(unknown)!r:.80}, which the manifest does not define",
        )
    return manifest, content


def decode(path: Path, content: bytes, document_type: type[_Document]) -> _Document:
    """Decode ``content``, the bytes of the JSON document at ``path``.

    Raises UnreadableFile if a key of the JSON document is unknown, missing or repeated.
    """
    parse_object(path, content, what=path.name)  # parse_object limits memory and depth before msgspec parses
    try:
        return msgspec.json.decode(content, type=document_type)
    except msgspec.MsgspecError as exc:
        raise UnreadableFile(path, f"expected a JSON document with ttexport's schema {SCHEMA}: {exc}") from exc


def is_inside(path: str) -> bool:
    """Whether ``path`` is a normalised relative path that a checksum file can represent."""
    pure = PurePosixPath(path)
    plain = not set(path) & {"\\", "\0"} and path.isprintable()
    return plain and bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and str(pure) == path


def _material(material: Material) -> dict[str, Any]:
    return {"name": material.name, "revision": material.revision, "files": dict(material.files)}


def _model(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "adapters": list(model.adapters),
        "folder": model.folder,
        "parameter_count": model.parameter_count,
        "size_label": model.size_label,
        "card": dict(model.card),
    }


def _artifact(artifact: Artifact) -> dict[str, Any]:
    return {
        "job": artifact.job,
        "model": artifact.model,
        "format": artifact.format,
        "storage": artifact.storage,
        "path": artifact.path,
        "parameters": dict(artifact.parameters),
        "verdict": _verdict(artifact.report) if artifact.report is not None else None,
        "notes": list(artifact.notes),
    }


def _verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checks of a report without their detail texts, because those texts may contain local paths."""
    return {
        "level": report["level"],
        "passed": report["passed"],
        "checks": [
            {key: _plain(check[key]) for key in ("name", "passed", "value", "limit")} for check in report["checks"]
        ],
        "skipped": [{"name": skip["name"], "reason": skip["reason"]} for skip in report.get("skipped", ())],
        "facts": {name: _plain(value) for name, value in report.get("facts", {}).items()},
    }


def _plain(value: Any) -> Any:
    """Return ``value``, or its name as text if ``value`` is NaN or infinity, which JSON cannot represent."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def schema() -> bytes:
    """Return the JSON schema of a manifest."""
    document = msgspec.json.schema(Manifest)
    return to_bytes(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ttexport release", **document}
    )


if __name__ == "__main__":
    Path(__file__).with_name("manifest.schema.json").write_bytes(schema())
