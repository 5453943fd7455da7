"""The expected auxiliary files of the tuned model, and the content of its tokenizer and templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.errors import UnreadableFile
from exporter.io.files import read_file
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import ADDITIONAL_TEMPLATES

TOKENIZER: Final = "tokenizer.json"
SETTINGS: Final = "tokenizer_config.json"
GENERATION: Final = "generation_config.json"
TEMPLATE: Final = "chat_template.jinja"

#: Files that contain a tokenizer. If an adapter has such a file, all tokenizer files come from the adapter's folder.
_VOCABULARIES: Final = (TOKENIZER, "tokenizer.model", "vocab.json")
#: Files with chat templates, which belong to the model and not to the tokenizer.
_TEMPLATES: Final = (TEMPLATE, "chat_template.json", ADDITIONAL_TEMPLATES)


def tuned_files(base: Mapping[str, Path], adapters: Sequence[Mapping[str, Path]]) -> dict[str, Path]:
    """Map file names to paths.

    An adapter's file replaces the base's file, and files of two tokenizers are never mixed.
    """
    brought: dict[str, Path] = {}
    for files in adapters:
        brought = dict(files) | brought
    kept = dict(base)
    if brought.keys() & set(_VOCABULARIES):
        kept = {name: path for name, path in base.items() if name == GENERATION or _is_template(name)}
    if any(map(_is_template, brought)) or "chat_template" in settings(brought):
        kept = {name: path for name, path in kept.items() if not _is_template(name)}
    return kept | brought


def _is_template(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _TEMPLATES)


def settings(files: Mapping[str, Path]) -> dict[str, Any]:
    """The parsed tokenizer_config.json, or {} without the file."""
    return read_object(files[SETTINGS]) if SETTINGS in files else {}


def templates(files: Mapping[str, Path]) -> dict[str, str]:
    """Map names to chat templates. The template without a name is ``default``.

    A template file takes precedence over tokenizer_config.json, as in transformers.
    """
    by_name: dict[str, str] = {}
    setting = settings(files).get("chat_template")
    if isinstance(setting, str):
        by_name["default"] = setting
    for entry in setting if isinstance(setting, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            by_name[str(entry.get("name"))] = entry["template"]
    path = files.get("chat_template.json")
    if path and isinstance(text := read_object(path).get("chat_template"), str):
        by_name["default"] = text
    if path := files.get(TEMPLATE):
        by_name["default"] = _text(path)
    return by_name | {files[name].stem: _text(files[name]) for name in files if fnmatchcase(name, ADDITIONAL_TEMPLATES)}


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in a text before the tokenizer splits it."""

    id: int
    text: str
    special: bool


def added(content: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Map ids to the added tokens of a parsed tokenizer.json."""
    entries = content.get("added_tokens") or []
    return {
        entry["id"]: AddedToken(entry["id"], str(entry.get("content")), bool(entry.get("special")))
        for entry in entries
        if isinstance(entry, dict) and type(entry.get("id")) is int
    }


def decoder(path: Path) -> Any:
    """The decoder of a tokenizer.json, or None without a decoder.

    Raises UnreadableFile if the file cannot be parsed.
    """

    class Only(msgspec.Struct):
        decoder: Any = None

    try:
        return msgspec.json.decode(read_file(path), type=Only).decoder
    except (ValueError, RecursionError) as exc:
        raise UnreadableFile(path, f"expected a tokenizer of the tokenizers library: {exc}") from exc


def _text(path: Path) -> str:
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as exc:
        raise UnreadableFile(path, "expected UTF-8 text, found invalid bytes") from exc
