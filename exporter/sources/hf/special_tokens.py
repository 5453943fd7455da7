"""Finds the ids of the bos, eos and pad tokens of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporter.io.json_objects import read_object
from exporter.sources.hf.tokenizer import added_tokens

#: Special tokens whose ids are given in config.json and generation_config.json.
SPECIAL_TOKENS: Final = ("bos", "eos", "pad")


def special_ids(files: Mapping[str, Path]) -> dict[str, int]:
    """Map the name (bos, eos or pad) of every special token that the tokenizer defines to the token's id.

    The special tokens are named in tokenizer_config.json or special_tokens_map.json, and their ids are given in
    tokenizer.json. files: maps the names of the tokenizer files to their paths. Raises UnreadableFile if a tokenizer
    file cannot be parsed.
    """
    names = ("special_tokens_map.json", "tokenizer_config.json")
    settings: dict[str, Any] = {}
    for name in names:
        settings |= read_object(files[name]) if name in files else {}
    texts = {name: _text(settings.get(f"{name}_token")) for name in SPECIAL_TOKENS}
    path = files.get("tokenizer.json")
    if path is None or not any(texts.values()):
        return {}
    by_text = added_tokens(path)
    return {name: by_text[text] for name, text in texts.items() if text in by_text}


def _text(token: object) -> str:
    """Return the text of ``token``, which is stored as a string or as a JSON object with text and flags.

    Returns "" if ``token`` is neither a string nor a JSON object.
    """
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
