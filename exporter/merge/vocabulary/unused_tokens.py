"""Leaves out tokens of a tokenizer that have no embedding row, if no text of the model needs the tokens.

A script that adds a token, such as ``[PAD]``, and saves the tokenizer without resizing the model leaves a tokenizer
that is larger than the embedding. A runtime with one vocabulary for both cannot represent such a tokenizer.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.errors import BadInput, NotExpressible
from exporter.io.files import read_file
from exporter.io.json_objects import as_json, read_object
from exporter.sources.hf.special_tokens import special_texts
from exporter.sources.hf.tokenizer import Tokenizer

_TOKENIZER: Final = "tokenizer.json"
#: Files that name tokens beside tokenizer.json.
_NAMING: Final = ("tokenizer_config.json", "special_tokens_map.json")
_NUMBERING: Final = "added_tokens.json"
_LISTS: Final = ("additional_special_tokens", "extra_special_tokens")


def without_unused(
    files: Mapping[str, Path], tokenizer: Tokenizer, rows: int, templates: Iterable[str]
) -> tuple[dict[str, Path], list[str]]:
    """Return (``files`` with tokenizer files that lack all tokens from the id ``rows`` on, texts of these tokens).

    files: the auxiliary files by name. templates: the chat templates of the merged model. The inputs stay unchanged:
    the changed files are written to a temporary folder.
    Raises NotExpressible if a text of the model needs such a token, and BadInput if such a token is not an added token.
    """
    unused = tokenizer.texts_from(rows)
    for token_id, text in unused.items():
        if text not in tokenizer.added:
            raise BadInput(
                f"{tokenizer.path}: expected added tokens from the id {rows} on, found the token {text!r} of the "
                f"vocabulary with the id {token_id}"
            )
        if user := _user(files, tokenizer, text, templates):
            raise NotExpressible(
                f"--drop-unused-tokens: {tokenizer.path}",
                f"the token {text!r} with the id {token_id} has no embedding row, but {user} contains the token",
                instead=f"train a row for the token, for example with ttexport tune --new-token {text!r}",
            )
    return {**files, **_written(_contents(files, set(unused.values())))}, list(unused.values())


def left_out(text: str) -> str:
    """Return the warning that the token ``text`` was left out."""
    return f"left out the token {text!r}, which has no embedding row"


def _user(files: Mapping[str, Path], tokenizer: Tokenizer, text: str, templates: Iterable[str]) -> str | None:
    """Return a description of what needs the token ``text``, or None."""
    if any(text in template for template in templates):
        return "a chat template"
    if text in (special_texts(files).get(name) for name in ("bos", "eos")):
        return "the setting of the token at the start or end of a text"
    return "the post-processor" if text in _strings(tokenizer.content.get("post_processor")) else None


def _strings(node: Any) -> set[str]:
    if isinstance(node, dict):
        return set().union(*(_strings(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*map(_strings, node))
    return {node} if isinstance(node, str) else set()


def _contents(files: Mapping[str, Path], unused: set[str]) -> dict[str, bytes]:
    fields = msgspec.json.decode(read_file(files[_TOKENIZER]), type=dict[str, msgspec.Raw])
    tokens = msgspec.json.decode(fields["added_tokens"], type=list[dict[str, Any]])
    kept = [token for token in tokens if token.get("content") not in unused]
    fields["added_tokens"] = msgspec.Raw(msgspec.json.encode(kept))
    contents = {_TOKENIZER: msgspec.json.encode(fields)}
    for name in _NAMING:
        if name in files:
            contents[name] = as_json(_unnamed(read_object(files[name]), unused))
    if _NUMBERING in files:
        numbers = read_object(files[_NUMBERING])
        contents[_NUMBERING] = as_json({text: number for text, number in numbers.items() if text not in unused})
    return contents


def _unnamed(settings: dict[str, Any], unused: set[str]) -> dict[str, Any]:
    """Return ``settings`` without the settings that name one of the tokens ``unused``."""
    kept = {key: value for key, value in settings.items() if not (key.endswith("_token") and _text(value) in unused)}
    for key in _LISTS:
        if isinstance(entries := kept.get(key), list):
            kept[key] = [entry for entry in entries if _text(entry) not in unused]
        elif isinstance(entries, dict):
            kept[key] = {role: entry for role, entry in entries.items() if _text(entry) not in unused}
    if isinstance(decoder := kept.get("added_tokens_decoder"), dict):
        kept["added_tokens_decoder"] = {key: entry for key, entry in decoder.items() if _text(entry) not in unused}
    return kept


def _text(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _written(contents: Mapping[str, bytes]) -> dict[str, Path]:
    """Write the files to a temporary folder, from which writers read until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="ttexport-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    paths = {name: folder / name for name in contents}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    return paths
