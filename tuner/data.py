"""Training texts: JSON Lines of ``{"text": …}``, read with line numbers in every complaint; needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible, UnreadableFile, reading

__all__ = ["Texts", "encode_texts", "read_texts"]

# Forms of a line that are understood, but that this version does not train on.
_LATER: Final = ("messages", "prompt", "completion")


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of a file in order, and ``digest``, the SHA-256 of its bytes in hex."""

    path: Path
    texts: tuple[str, ...]
    digest: str


def read_texts(path: Path) -> Texts:
    """Read a JSONL file; blank lines are skipped, fields beside ``text`` are ignored.

    Raises: UnreadableFile naming the line (not UTF-8, not JSON), BadInput naming the line (no text in it) or the file
    (no line in it), NotExpressible for prompt/completion and chat lines.
    """
    with reading(path):
        raw = path.read_bytes()
    texts = tuple(_text(path, number, line) for number, line in _lines(raw))
    if not texts:
        raise BadInput(f'{path}: expected lines like {{"text": "…"}}, found none')
    return Texts(path, texts, hashlib.sha256(raw).hexdigest())


def _lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    # Split on newlines only: other separators that str.splitlines knows may stand inside a JSON string.
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _text(path: Path, number: int, line: bytes) -> str:
    where = f"{path}:{number}"
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise UnreadableFile(where, f"not UTF-8 at byte {exc.start + 1} of the line") from exc
    except (json.JSONDecodeError, RecursionError) as exc:
        reason = f"{exc.msg} at column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else "nested too deeply"
        raise UnreadableFile(where, f"not JSON: {reason}") from exc
    if not isinstance(entry, dict):
        raise BadInput(f'{where}: expected an object like {{"text": "…"}}, found {_kind(entry)}')
    if "text" not in entry:
        if found := [key for key in _LATER if key in entry]:
            raise NotExpressible("tune", f'{where} has "{found[0]}"', instead='only "text" lines are read')
        raise BadInput(f'{where}: expected the field "text", found {", ".join(map(repr, entry)) or "no field"}')
    text = entry["text"]
    if not isinstance(text, str) or not text:
        raise BadInput(f'{where}: expected "text" to be a non-empty string, found {_kind(text)}')
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "an empty string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], int]:
    """Return the ids of each text with the end token after it, and how many texts were cut to ``max_length``.

    The end token is added only if the tokenizer has one and did not write it itself.
    """
    end = tokenizer.eos_token_id
    encoded: list[list[int]] = []
    cut = 0
    for text in texts:
        ids: list[int] = list(tokenizer(text)["input_ids"])
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        cut += len(ids) > max_length
        encoded.append(ids[:max_length])
    return encoded, cut
