"""Parse ``release.toml``, the description of a release, and reject unknown keys.

Paths in ``release.toml`` are relative to the folder of the file.
"""

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

#: Pattern of names that become part of paths in the release and of repository names on hubs.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
#: Names of files next to the folders of the models. No model may have one of these names.
_RESERVED: Final = frozenset(
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
#: Tables that are option groups, each with the defaults that differ in a release. The verification level is ``full``.
GROUPS: Final[Mapping[str, tuple[type[Options], Mapping[str, Any]]]] = {
    **{name: (row.options, {}) for name, row in FORMATS.items()},
    VerifyOptions.section: (VerifyOptions, {"level": "full"}),
}


class ReleaseSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``release.toml``. base, adapters: paths or hub ids (org/name, org/name@revision)."""

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
        """Every key and value of ``release.toml``, as parsed from the file.

        Every file path among the values is replaced by the name of the file.
        """
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
    """Types of the keys and tables that occur only in ``release.toml`` and are not options of ``ttexport export``."""

    name: str
    version: str
    base: str
    models: dict[str, ModelTable]
    card: dict[str, Any] = {}
    signing: SigningTable | None = None
    hub: HubTable | None = None


_PLAIN_TABLES: Final[Mapping[str, type[msgspec.Struct]]] = {"signing": SigningTable, "hub": HubTable, "card": CardEntry}


def read_spec(path: Path) -> ReleaseSpec:
    """Read ``release.toml`` and convert relative paths in the file to absolute paths.

    Raises UnreadableFile if ``release.toml`` is not valid TOML, and BadInput if a key is unknown or a value is invalid.
    """
    try:
        document = tomllib.loads(read_file(path).decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UnreadableFile(path, f"expected valid TOML: {exc}") from exc
    for fault in _unknown_keys(document):
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
    for fault in (*_rule_violations(spec), *_misplaced_inputs(spec, path.parent)):
        raise BadInput(f"{path}: {fault}")
    return _resolve_paths(spec, path.parent)


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


def _unknown_keys(document: Mapping[str, Any]) -> Iterator[str]:
    """Return one line for each unknown key, with the most similar known key of the same table."""
    fields = msgspec.structs.fields(_Plain)
    known = (
        [field.encode_name for field in fields] + [entry.key for entry in MergeOptions.options().values()] + [*GROUPS]
    )
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


def _rule_violations(spec: ReleaseSpec) -> Iterator[str]:
    """Check rules that a type does not express, such as unique model names, and return one line for each violation."""
    for key, value in [("name", spec.name), ("version", spec.version), *(("models", name) for name in spec.models)]:
        if not _NAME.fullmatch(value):
            yield f"{key}: expected letters, digits, dots, dashes or underscores, found {value!r:.80}"
    if not spec.models:
        yield "models: expected at least one model, found no model"
    if len({*map(str.lower, spec.models)}) != len(spec.models):
        yield f"models: expected names that are unique without regard to case, found {', '.join(spec.models)}"
    for name in spec.models if len(spec.models) > 1 else ():
        if name.lower() in _RESERVED:
            yield f"models.{name}: expected a different name, because a document of the release has the same name"
    if not spec.formats:
        yield f"expected at least one of the format tables {', '.join(FORMATS)}, found no format table"
    if spec.signing and bool(spec.signing.key) == spec.signing.sigstore:
        yield "signing: expected exactly one of the two settings key and sigstore = true"


def _misplaced_inputs(spec: ReleaseSpec, folder: Path) -> Iterator[str]:
    """Return one line for each input that exists in the current folder but not below ``folder``.

    A path that exists only in the current folder is a mistake, because paths in ``release.toml`` are relative to the
    folder of ``release.toml``.
    """
    inputs = [("base", spec.base)]
    inputs += [(f"models.{name}.adapters", source) for name, model in spec.models.items() for source in model.adapters]
    for key, source in inputs:
        if not os.path.lexists(folder / source) and os.path.lexists(source):
            yield (
                f"{key}: expected a hub id or a path relative to the folder of release.toml, "
                f"found {source!r:.80}, a path that exists only relative to the current folder"
            )


def _resolve_paths(spec: ReleaseSpec, folder: Path) -> ReleaseSpec:
    """Return ``spec`` with relative paths converted to paths below ``folder``.

    An input that does not exist in ``folder`` is not converted, because the input may be a hub id.
    """

    def resolve(source: str) -> str:
        path = folder / source
        return str(path) if os.path.lexists(path) else source

    change = msgspec.structs.replace
    key = spec.signing and spec.signing.key
    return change(
        spec,
        base=resolve(spec.base),
        models={
            name: change(model, adapters=[resolve(source) for source in model.adapters])
            for name, model in spec.models.items()
        },
        formats=tuple(_resolve_files(options, folder) for options in spec.formats),
        verify=_resolve_files(spec.verify, folder),
        signing=spec.signing and change(spec.signing, key=str(folder / key) if key else None),
    )


def _resolve_files(options: Any, folder: Path) -> Any:
    names = {entry.key: name for name, entry in options.options().items()}
    return replace(options, **{names[key]: folder / path for key, path in options.files().items()})
