"""``release.toml``: what a release is made of, parsed strictly. Relative paths start at the folder of the file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.errors import BadInput, UnreadableFile
from exporter.export.spec import MergeOptions
from exporter.formats.table import FORMATS
from exporter.formats.target import FormatOptions
from exporter.io.files import read_file
from exporter.options import OptionError, Options, as_key
from exporter.release.documents.manifest import CardEntry, card_texts
from exporter.release.tables import HubTable, ModelTable, SigningTable, unknown_keys
from exporter.verify.options import VerifyOptions

#: Becomes part of paths in the release, and of names on hubs.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
#: What lies beside the folders of several models, and so is no name for one.
_TAKEN: Final = frozenset(
    {
        "manifest.json",
        "model.sig",
        "piece.json",
        "provenance.intoto.json",
        "readme.md",
        "report.json",
        "run.json",
        "sha256sums",
    }
)
#: Tables that are option groups, with what differs from the group's defaults: a release is verified in full.
GROUPS: Final[Mapping[str, tuple[type[Options], Mapping[str, Any]]]] = {
    **{name: (row.options, {}) for name, row in FORMATS.items()},
    VerifyOptions.section: (VerifyOptions, {"level": "full"}),
}


class ReleaseSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file. base: a path, or a hub id (org/name, org/name@revision); adapters likewise."""

    name: str
    version: str
    base: str
    models: dict[str, ModelTable]
    formats: tuple[FormatOptions, ...]
    merge: MergeOptions
    verify: VerifyOptions
    card: dict[str, Any] = {}
    signing: SigningTable | None = None
    hub: HubTable | None = None

    def to_json(self) -> dict[str, Any]:
        """The file as it was understood: every key with its value; files by their names alone."""
        return {
            "name": self.name,
            "version": self.version,
            "base": self.base,
            **self.merge.to_json(),
            "models": msgspec.to_builtins(self.models),
            **{options.section: options.to_json() for options in self.formats},
            self.verify.section: self.verify.to_json(),
            "card": dict(self.card),
            "signing": self.signing and self.signing.to_json(),
            "hub": msgspec.to_builtins(self.hub),
        }


class _Plain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys and tables that are no option groups."""

    name: str
    version: str
    base: str
    models: dict[str, ModelTable]
    card: dict[str, Any] = {}
    signing: SigningTable | None = None
    hub: HubTable | None = None


_PLAIN_TABLES: Final[Mapping[str, type[msgspec.Struct]]] = {"signing": SigningTable, "hub": HubTable, "card": CardEntry}


def read_spec(path: Path) -> ReleaseSpec:
    """Read ``release.toml``; its relative paths come out below its folder.

    Raises UnreadableFile for a file that is no TOML, BadInput for an unknown key or a value that its key does not take.
    """
    try:
        document = tomllib.loads(read_file(path).decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UnreadableFile(path, f"expected TOML: {exc}") from exc
    for fault in _unknown(document):
        raise BadInput(f"{path}: {fault}")
    try:
        spec = _read(document)
    except msgspec.ValidationError as exc:
        raise BadInput(f"{path}: {exc}") from exc
    except OptionError as exc:
        raise BadInput(f"{path}: {exc.worded(as_key)}") from exc
    card_texts(spec.card, f"{path}: card")
    for name, model in spec.models.items():
        card_texts(model.card, f"{path}: models.{name}.card")
    for fault in (*_faults(spec), *_astray(spec, path.parent)):
        raise BadInput(f"{path}: {fault}")
    return _placed(spec, path.parent)


def _read(document: Mapping[str, Any]) -> ReleaseSpec:
    merge_keys = {entry.key for entry in MergeOptions.options().values()}
    plain = {key: value for key, value in document.items() if key not in GROUPS and key not in merge_keys}
    groups = {name: _group(name, document[name]) for name in GROUPS if name in document}
    verify = groups.pop(VerifyOptions.section, None) or _group(VerifyOptions.section, {})
    return ReleaseSpec(
        **msgspec.structs.asdict(msgspec.convert(plain, _Plain)),
        formats=tuple(options for options in groups.values() if isinstance(options, FormatOptions)),
        merge=_parse(MergeOptions, {key: document[key] for key in merge_keys & document.keys()}),
        verify=verify,
    )


def _group(name: str, table: Any) -> Any:
    group, defaults = GROUPS[name]
    if not isinstance(table, dict):
        raise msgspec.ValidationError(f"{name}: expected a table, found {table!r:.80}")
    return _parse(group, table, defaults)


def _parse(group: type[Options], table: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Any:
    names = {entry.key: name for name, entry in group.options().items()}
    return group.parse({**(defaults or {}), **{names[key]: value for key, value in table.items()}})


def _unknown(document: Mapping[str, Any]) -> Iterator[str]:
    """A line for every key that its table does not have, with the nearest known one."""
    tops = [*msgspec.structs.fields(_Plain)]
    known = [field.encode_name for field in tops] + [entry.key for entry in MergeOptions.options().values()] + [*GROUPS]
    yield from unknown_keys(document, known, "")
    for name, model in _tables(document.get("models")):
        yield from unknown_keys(model, ModelTable, f"models.{name}.")
        if isinstance(card := model.get("card"), dict):
            yield from unknown_keys(card, CardEntry, f"models.{name}.card.")
    for name, table in _tables(document):
        if name in GROUPS:
            keys = [entry.key for entry in GROUPS[name][0].options().values()]
            yield from unknown_keys(table, keys, f"{name}.")
        elif name in _PLAIN_TABLES:
            yield from unknown_keys(table, _PLAIN_TABLES[name], f"{name}.")


def _tables(document: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(document, dict):
        yield from ((name, value) for name, value in document.items() if isinstance(value, dict))


def _faults(spec: ReleaseSpec) -> Iterator[str]:
    """Rules that the types of the values do not express."""
    for key, value in [("name", spec.name), ("version", spec.version), *(("models", name) for name in spec.models)]:
        if not _NAME.fullmatch(value):
            yield f"{key}: expected letters, digits, dots, dashes or underscores, found {value!r:.80}"
    if not spec.models:
        yield "models: expected one or more, found none"
    if len({*map(str.lower, spec.models)}) != len(spec.models):
        yield f"models: expected names that differ in more than case, found {', '.join(spec.models)}"
    for name in spec.models if len(spec.models) > 1 else ():
        if name.lower() in _TAKEN:
            yield f"models.{name}: expected a name for a folder, found that of a document of the release"
    if not spec.formats:
        yield f"expected a table {', '.join(FORMATS)}, found none: there is nothing to make"
    if spec.signing and bool(spec.signing.key) == spec.signing.sigstore:
        yield "signing: expected either a key or sigstore = true"


def _astray(spec: ReleaseSpec, folder: Path) -> Iterator[str]:
    """Inputs that name nothing below ``folder``, but something where the command runs: elsewhere they would not."""
    inputs = [("base", spec.base)]
    inputs += [(f"models.{name}.adapters", source) for name, model in spec.models.items() for source in model.adapters]
    for key, source in inputs:
        if not os.path.lexists(folder / source) and os.path.lexists(source):
            yield f"{key}: expected a path from the folder of this file, or a hub id, found {source!r:.80} elsewhere"


def _placed(spec: ReleaseSpec, folder: Path) -> ReleaseSpec:
    """With paths below ``folder``; an input that is not there may be a hub id and stays."""

    def place(source: str) -> str:
        path = folder / source
        return str(path) if os.path.lexists(path) else source

    change = msgspec.structs.replace
    key = spec.signing and spec.signing.key
    return change(
        spec,
        base=place(spec.base),
        models={
            name: change(model, adapters=[place(source) for source in model.adapters])
            for name, model in spec.models.items()
        },
        formats=tuple(_below(options, folder) for options in spec.formats),
        verify=_below(spec.verify, folder),
        signing=spec.signing and change(spec.signing, key=str(folder / key) if key else None),
    )


def _below(options: Any, folder: Path) -> Any:
    names = {entry.key: name for name, entry in options.options().items()}
    return replace(options, **{names[key]: folder / path for key, path in options.files().items()})
