"""manifest.json: all that a release is, but for its run. The other documents are made from it, and checked against it.

Its JSON schema, ``manifest.schema.json``, is written by ``python -m exporter.release.documents.manifest``. A manifest
has one spelling: keys in order, two spaces of indentation, a newline at the end. Bytes that read the same but are
spelled otherwise were not written by ttexport.
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
#: Raised when a key changes its meaning or goes.
SCHEMA: Final = 2
#: 60,000 tensors, as the largest mixtures of experts have them, come to 7 MB a format.
_MAX_BYTES: Final = 48 << 20

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, msgspec.Meta(ge=0)]
_Document = TypeVar("_Document")


class MaterialEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that went in: a hub id or a folder's name, the hub's commit, and name → sha256 of what was read."""

    name: str
    revision: str | None
    files: dict[str, Sha256]


class CardEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Texts of ``release.toml`` for a model card: front matter as the hub reads it, then paragraphs."""

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
    """A tuned model: adapters by name, its folder (empty: the release itself), and the texts of its card."""

    name: str
    adapters: list[str]
    folder: str
    parameter_count: Size
    size_label: str
    card: CardEntry


class CheckEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A gate of the verification; value and limit are null where it is yes or no, a text where it is not finite."""

    name: str
    passed: bool
    value: float | str | None
    limit: float | str | None


class SkipEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the proof that was not done, and why."""

    name: str
    reason: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the verification of an artifact found; facts are measurements without a gate."""

    level: str
    passed: bool
    checks: list[CheckEntry]
    skipped: list[SkipEntry]
    facts: dict[str, float | str | None]


class ArtifactEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that came out: ``path`` is a file or a folder below the release."""

    job: str
    model: str
    format: str
    storage: str
    path: str
    parameters: dict[str, Any]
    verdict: Verdict | None


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file below the release. tensors: name → sha256 of the bytes as they are stored, for files that hold tensors."""

    path: str
    kind: str
    size: Size
    sha256: Sha256
    tensors: dict[str, Sha256]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole document. ``tools``: package → version; the quantiser's build is among them."""

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
    """The manifest of ``release``, whose ``files`` are all but the documents that are made from it.

    Raises BadInput for facts that a manifest cannot hold, such as texts that no card has.
    """
    document = {
        "schema": SCHEMA,
        "kind": "ttexport release",
        "name": release.name,
        "version": release.version,
        "base": _material(release.base),
        "adapters": {name: _material(one) for name, one in release.adapters.items()},
        "models": {key: _model(one) for key, one in release.models.items()},
        "artifacts": [_artifact(one) for one in sorted(release.artifacts, key=lambda one: (one.path, one.job))],
        "tools": dict(release.tools),
        "spec": dict(release.spec),
        "files": [msgspec.to_builtins(one) for one in sorted(files, key=lambda one: one.path)],
    }
    # Through JSON, so that what was built equals what will be read: tuples become lists, integers floats.
    try:
        return msgspec.json.decode(msgspec.json.encode(document), type=Manifest)
    except msgspec.ValidationError as exc:
        raise BadInput(f"{release.name}: its facts make no {NAME}: {exc}") from exc


def card_texts(table: Mapping[str, Any], where: str) -> CardEntry:
    """``table`` of ``release.toml`` as the texts of a card. Raises BadInput, naming ``where``, for any other key."""
    try:
        return msgspec.convert(dict(table), CardEntry)
    except msgspec.ValidationError as exc:
        raise BadInput(f"{where}: {exc}") from exc


def to_bytes(document: object) -> bytes:
    """The one spelling of ``document`` (a struct, or JSON values)."""
    return msgspec.json.format(msgspec.json.encode(document, order="deterministic"), indent=2) + b"\n"


def read(path: Path) -> tuple[Manifest, bytes]:
    """The manifest at ``path``, and its bytes.

    Raises UnreadableFile for what is no manifest of this version, or names what is not in it or not below its folder.
    Another spelling of the same manifest is left to the caller to see.
    """
    content = read_file(path, max_nbytes=_MAX_BYTES)
    manifest = decode(path, content, Manifest)
    folders = [model.folder for model in manifest.models.values() if model.folder]
    for place in [*folders, *(one.path for one in manifest.artifacts), *(one.path for one in manifest.files)]:
        if not is_inside(place):
            raise UnreadableFile(path, f"expected paths below the release, found {place!r:.80}")
    if lost := {one.model for one in manifest.artifacts} - manifest.models.keys():
        raise UnreadableFile(path, f"expected every artifact to be of a model, found {min(lost)!r:.80}")
    if lost := {name for model in manifest.models.values() for name in model.adapters} - manifest.adapters.keys():
        raise UnreadableFile(path, f"expected every model to be of known adapters, found {min(lost)!r:.80}")
    return manifest, content


def decode(path: Path, content: bytes, kind: type[_Document]) -> _Document:
    """``content`` as ``kind``, every key known, none missing and none twice. Raises UnreadableFile."""
    parse_object(path, content, what=path.name)  # whose bounds on memory and depth hold for what comes next
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.MsgspecError as exc:
        raise UnreadableFile(path, f"expected a document of ttexport's schema {SCHEMA}: {exc}") from exc


def is_inside(path: str) -> bool:
    """Whether ``path`` is a plain relative path, spelled in the one way that checksums can hold."""
    pure = PurePosixPath(path)
    plain = not set(path) & {"\\", "\0"} and path.isprintable()
    return plain and bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and str(pure) == path


def _material(one: Material) -> dict[str, Any]:
    return {"name": one.name, "revision": one.revision, "files": dict(one.files)}


def _model(one: Model) -> dict[str, Any]:
    return {
        "name": one.name,
        "adapters": list(one.adapters),
        "folder": one.folder,
        "parameter_count": one.parameter_count,
        "size_label": one.size_label,
        "card": dict(one.card),
    }


def _artifact(one: Artifact) -> dict[str, Any]:
    return {
        "job": one.job,
        "model": one.model,
        "format": one.format,
        "storage": one.storage,
        "path": one.path,
        "parameters": dict(one.parameters),
        "verdict": _verdict(one.report) if one.report is not None else None,
    }


def _verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """The gates of a report without their details, which may name places of the machine."""
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
    """JSON has no NaN or Infinity: such a value is written as its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def schema() -> bytes:
    """The JSON schema of a manifest."""
    document = msgspec.json.schema(Manifest)
    return to_bytes(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ttexport release", **document}
    )


if __name__ == "__main__":
    Path(__file__).with_name("manifest.schema.json").write_bytes(schema())
