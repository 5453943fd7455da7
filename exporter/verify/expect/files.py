"""Find the tuned model's auxiliary files, and read the tokenizer and the tokenizer config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.errors import BadInput, UnreadableFile
from exporter.io.files import read_file
from exporter.io.json_objects import read_object
from exporter.sources.hf.tokenizer import read_tokenizer
from exporter.verify.expect.templates import is_of_processor, is_template, templates

TOKENIZER: Final = "tokenizer.json"
SETTINGS: Final = "tokenizer_config.json"
GENERATION: Final = "generation_config.json"

#: Files that contain a tokenizer. If an adapter has such a file, all tokenizer files come from the adapter's folder.
_VOCABULARIES: Final = (
    *(TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json", "tiktoken.model"),
)


def tuned_files(base: Mapping[str, Path], adapters: Sequence[Mapping[str, Path]]) -> dict[str, Path]:
    """Return a dict from file name to path for the tuned model's auxiliary files, such as tokenizer and chat templates.

    An adapter's file replaces the base model's file of the same name. If an adapter has tokenizer files, no tokenizer
    file of the base model is used. If an adapter has chat templates, no chat template of the base model is used. If
    several adapters have a tokenizer, the files of the tokenizer with the most added tokens are used. Raises BadInput
    if an added token of any other adapter's tokenizer is missing from the tokenizer with the most added tokens.
    """
    brought: dict[str, Path] = {}
    for files in _by_size(adapters):
        brought = dict(files) | brought
    kept = dict(base)
    if brought.keys() & set(_VOCABULARIES):
        free = (is_template, is_of_processor, GENERATION.__eq__)
        kept = {name: path for name, path in base.items() if any(belongs(name) for belongs in free)}
    if templates(brought, processor=any(map(is_of_processor, base))):
        kept = {name: path for name, path in kept.items() if not is_template(name)}
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


def settings(files: Mapping[str, Path]) -> dict[str, Any]:
    """Return the parsed tokenizer_config.json, or {} if ``files`` does not contain a tokenizer_config.json."""
    return read_object(files[SETTINGS]) if SETTINGS in files else {}


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
