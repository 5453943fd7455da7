"""Decides whether one tokenizer contains a second tokenizer and can therefore be used in place of the second.

A tokenizer A contains a tokenizer B if A and B have equal settings, vocabularies and merges, and every added token of B
is an added token of A with the same id and flags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.io.files import read_file
from exporter.io.json_objects import parse_object, read_object

_TOKENIZER: Final = "tokenizer.json"
_ADDED: Final = "added_tokens"
#: Files of settings → keys whose values list added tokens.
_LISTS: Final = {
    "tokenizer_config.json": ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
    "special_tokens_map.json": ("additional_special_tokens", "extra_special_tokens"),
}
_BY_TEXT: Final = "added_tokens.json"


def largest(tokenizers: Sequence[Mapping[str, Path]]) -> Mapping[str, Path] | None:
    """Return the tokenizer that contains all other tokenizers, or None if no tokenizer contains all others.

    tokenizers: for each tokenizer, a dict that maps file names to paths. Peak memory: the size of two tokenizer.json
    files. Raises UnreadableFile if a tokenizer's settings file is not a JSON object.
    """
    return next((files for files in tokenizers if all(_contains(files, other) for other in tokenizers)), None)


def _contains(files: Mapping[str, Path], other: Mapping[str, Path]) -> bool:
    return files is other or (
        files.keys() == other.keys() and all(_file_contains(name, files[name], other[name]) for name in files)
    )


def _file_contains(name: str, path: Path, other: Path) -> bool:
    if read_file(path) == read_file(other):
        return True
    if name == _TOKENIZER:
        return _tokenizer_contains(path, other)
    if name == _BY_TEXT:
        return _value_contains(read_object(path), read_object(other))
    lists = _LISTS.get(name, ())
    first, second = (read_object(file) if lists else {} for file in (path, other))
    rest = [{key: value for key, value in settings.items() if key not in lists} for settings in (first, second)]
    return bool(lists) and rest[0] == rest[1] and all(_value_contains(first.get(key), second.get(key)) for key in lists)


def _tokenizer_contains(path: Path, other: Path) -> bool:
    """Whether the tokenizer.json at ``path`` equals ``other``, except for additional added tokens."""
    fields, other_fields = _fields(path), _fields(other)
    added = _tokens(path, fields.pop(_ADDED, None))
    other_added = _tokens(other, other_fields.pop(_ADDED, None))
    return fields == other_fields and _value_contains(added, other_added)


def _fields(path: Path) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(read_file(path), type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        return {str(path): msgspec.Raw(b"")}  # contains no other tokenizer


def _tokens(path: Path, raw: msgspec.Raw | None) -> dict[Any, Any]:
    """Return a dict that maps the id of each added token in ``raw`` to the token's JSON object (text and flags)."""
    tokens = None if raw is None else parse_object(path, b'{"": ' + bytes(raw) + b"}", what=_ADDED)[""]
    return {str(token.get("id")): token for token in tokens or [] if isinstance(token, dict)}


def _value_contains(value: Any, other: Any) -> bool:
    """Whether the list or JSON object ``value`` contains all items of the list or JSON object ``other``.

    A missing value counts as an empty list or object.
    """
    if not value or not other:
        return not other
    if isinstance(value, dict) and isinstance(other, dict):
        return all(key in value and value[key] == item for key, item in other.items())
    return isinstance(value, list) and isinstance(other, list) and all(item in value for item in other)
