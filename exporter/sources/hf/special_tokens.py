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
    texts = special_texts(files)
    path = files.get("tokenizer.json")
    if path is None or not any(texts.values()):
        return {}
    by_text = added_tokens(path)
    return {name: by_text[text] for name, text in texts.items() if text in by_text}


def special_texts(files: Mapping[str, Path]) -> dict[str, str]:
    """Map the name (bos, eos or pad) of every special token to the token's text, or to "" without such a token.

    As in transformers, a token in special_tokens_map.json replaces the token in tokenizer_config.json, unless
    tokenizer_config.json contains added_tokens_decoder.
    """
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in files and "added_tokens_decoder" not in settings:
            settings |= read_object(files[name])
    return {name: _text(settings.get(f"{name}_token")) for name in SPECIAL_TOKENS}


def _text(token: object) -> str:
    """Return the text of ``token``, which is stored as a string or as a JSON object with text and flags.

    Returns "" if ``token`` is neither a string nor a JSON object.
    """
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
