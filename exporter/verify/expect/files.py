"""Find the tuned model's auxiliary files, and read the tokenizer, the tokenizer config and the chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.errors import BadInput, UnreadableFile
from exporter.io.files import read_file
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import ADDITIONAL_TEMPLATES
from exporter.sources.hf.tokenizer import read_tokenizer

TOKENIZER: Final = "tokenizer.json"
SETTINGS: Final = "tokenizer_config.json"
GENERATION: Final = "generation_config.json"
TEMPLATE: Final = "chat_template.jinja"

#: Files that contain a tokenizer. If an adapter has such a file, all tokenizer files come from the adapter's folder.
_VOCABULARIES: Final = (TOKENIZER, "tokenizer.model", "vocab.json")
#: Files with chat templates, which belong to the model and not to the tokenizer.
_TEMPLATES: Final = (TEMPLATE, "chat_template.json", ADDITIONAL_TEMPLATES)


def tuned_files(base: Mapping[str, Path], adapters: Sequence[Mapping[str, Path]]) -> dict[str, Path]:
    """Return a dict from file name to path for the tuned model's auxiliary files, such as tokenizer and chat templates.

    An adapter's file replaces the base model's file of the same name. If an adapter has tokenizer files, no tokenizer
    file of the base model is used. If several adapters have a tokenizer, the files of the tokenizer with the most added
    tokens are used. Raises BadInput if an added token of any other adapter's tokenizer is missing from the tokenizer
    with the most added tokens.
    """
    brought: dict[str, Path] = {}
    for files in _by_size(adapters):
        brought = dict(files) | brought
    kept = dict(base)
    if brought.keys() & set(_VOCABULARIES):
        kept = {name: path for name, path in base.items() if name == GENERATION or _is_template(name)}
    if any(map(_is_template, brought)) or "chat_template" in settings(brought):
        kept = {name: path for name, path in kept.items() if not _is_template(name)}
    return kept | brought


def _by_size(adapters: Sequence[Mapping[str, Path]]) -> list[Mapping[str, Path]]:
    """Sort the adapters' file dicts so that the adapter whose tokenizer has the most added tokens is first."""
    paths = [files[TOKENIZER] for files in adapters if TOKENIZER in files]
    if len(paths) < 2 or len({read_file(path) for path in paths}) == 1:
        return list(adapters)
    tokens = {path: added(read_tokenizer(path)) for path in paths}
    largest = max(paths, key=lambda path: len(tokens[path]))
    for path in paths:
        for token_id, token in tokens[path].items():
            if tokens[largest].get(token_id) != token:
                raise BadInput(f"{largest}: expected the token {token.text!r} with id {token_id}, as in {path}")
    return sorted(adapters, key=lambda files: files.get(TOKENIZER) != largest)


def _is_template(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _TEMPLATES)


def settings(files: Mapping[str, Path]) -> dict[str, Any]:
    """Return the parsed tokenizer_config.json, or {} if ``files`` does not contain a tokenizer_config.json."""
    return read_object(files[SETTINGS]) if SETTINGS in files else {}


def templates(files: Mapping[str, Path]) -> dict[str, str]:
    """Return a dict from name to text of each chat template. A template without a name gets the name ``default``.

    A chat template in a separate file takes precedence over a chat template in tokenizer_config.json, as in
    transformers.
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
    """A token from ``added_tokens`` in tokenizer.json, which is never split when a text is tokenised."""

    id: int
    text: str
    special: bool


def added(content: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return a dict from token id to added token for all added tokens in a parsed tokenizer.json."""
    entries = content.get("added_tokens") or []
    return {
        entry["id"]: AddedToken(entry["id"], str(entry.get("content")), bool(entry.get("special")))
        for entry in entries
        if isinstance(entry, dict) and type(entry.get("id")) is int
    }


def decoder(path: Path) -> Any:
    """Return the decoder section of a tokenizer.json, or None if the file has no decoder section.

    Raises UnreadableFile if the tokenizer.json cannot be parsed.
    """

    class Only(msgspec.Struct):
        decoder: Any = None

    try:
        return msgspec.json.decode(read_file(path), type=Only).decoder
    except (ValueError, RecursionError) as exc:
        raise UnreadableFile(
            path, f"expected a file in the format of the tokenizers library, but decoding failed: {exc}"
        ) from exc


def _text(path: Path) -> str:
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as exc:
        raise UnreadableFile(path, "expected UTF-8 text, found invalid bytes") from exc
