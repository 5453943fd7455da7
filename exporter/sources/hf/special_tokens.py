"""Which ids a tokenizer gives to the tokens that begin, end and pad a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporter.io.json_objects import read_object
from exporter.sources.hf.tokenizer import added_tokens

#: The special tokens whose ids stand in config.json and generation_config.json.
SPECIAL_TOKENS: Final = ("bos", "eos", "pad")


def special_ids(files: Mapping[str, Path]) -> dict[str, int]:
    """Kind → id, for those that tokenizer_config.json (or special_tokens_map.json) names and tokenizer.json holds.

    files: tokenizer files by name. Raises UnreadableFile for one that cannot be parsed.
    """
    names = ("special_tokens_map.json", "tokenizer_config.json")
    settings: dict[str, Any] = {}
    for name in names:
        settings |= read_object(files[name]) if name in files else {}
    texts = {kind: _text(settings.get(f"{kind}_token")) for kind in SPECIAL_TOKENS}
    path = files.get("tokenizer.json")
    if path is None or not any(texts.values()):
        return {}
    by_text = added_tokens(path)
    return {kind: by_text[text] for kind, text in texts.items() if text in by_text}


def _text(token: object) -> str:
    """A token stands as a string or as a table with flags; "" for none."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
