"""The tokenizer that is expected of an artifact for which tokens without an embedding row were left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.io.files import read_file
from exporter.verify.expect.files import TOKENIZER


def drop_tokens(files: Mapping[str, Path], rows: int, folder: Path) -> dict[str, Path]:
    """Return ``files`` with tokenizer files without the added tokens from the id ``rows`` on, written to ``folder``.

    files: the auxiliary files of the tuned model by name. rows: the number of rows of the embedding.
    """
    if TOKENIZER not in files:
        return dict(files)
    content = json.loads(read_file(files[TOKENIZER]))
    gone = {token["content"] for token in content["added_tokens"] if token["id"] >= rows}
    if not gone:
        return dict(files)
    changed = {TOKENIZER: content}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if name in files:
            changed[name] = json.loads(read_file(files[name]))
    out = dict(files)
    for name, value in changed.items():
        out[name] = folder / name
        out[name].write_text(json.dumps(_pruned(value, gone), ensure_ascii=False), encoding="utf-8")
    return out


def _pruned(node: Any, gone: set[str]) -> Any:
    """Return a JSON value without the entries that are one of the tokens ``gone``, by text, by object or by key."""
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if not _is_gone(value, gone)}
        kept = {key: value for key, value in kept.items() if not (key in gone and type(value) is int)}
        nested = ("added_tokens", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
        return {key: _pruned(value, gone) if key in nested else value for key, value in kept.items()}
    if isinstance(node, list):
        return [value for value in node if not _is_gone(value, gone)]
    return node


def _is_gone(value: Any, gone: set[str]) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and text in gone
