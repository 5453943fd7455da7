"""Training examples: JSON Lines of one kind, read with line numbers in every complaint; needs no torch.

The kinds of a line: ``{"text": …}``; ``{"prompt": …, "completion": …}``; ``{"messages": [{"role": …, "content": …}]}``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, UnreadableFile, reading

__all__ = ["Example", "Examples", "read_examples", "split_examples"]

# Kind → the fields of its lines. Other fields are ignored.
_KINDS: Final = {"text": ("text",), "prompt": ("prompt", "completion"), "messages": ("messages",)}
_WANTED: Final = '"text", "prompt" and "completion", or "messages"'


@dataclass(frozen=True, slots=True)
class Example:
    """One line: its number, counted from 1, and the values of its kind's fields."""

    line: int
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of a file in order; kind is ``text``, ``prompt`` or ``messages``, digest SHA-256 of its bytes."""

    path: Path
    kind: str
    examples: tuple[Example, ...]
    digest: str


def read_examples(path: Path) -> Examples:
    """Read a JSONL file; blank lines are skipped.

    Raises: UnreadableFile naming the line (not UTF-8, not JSON), BadInput naming the line (fields missing or of the
    wrong type, another kind than the lines before) or the file (no line in it).
    """
    with reading(path):
        raw = path.read_bytes()
    kind = ""
    examples: list[Example] = []
    for number, line in _lines(raw):
        where = f"{path}:{number}"
        entry = _parse(where, line)
        found = _kind(where, entry)
        if kind and found != kind:
            raise BadInput(f'{where}: expected "{kind}" as in line {examples[0].line}, found "{found}"')
        kind = found
        check = _message_list if kind == "messages" else _string
        examples.append(Example(number, tuple(check(where, name, entry[name]) for name in _KINDS[kind])))
    if not examples:
        raise BadInput(f"{path}: expected lines with {_WANTED}, found none")
    return Examples(path, kind, tuple(examples), hashlib.sha256(raw).hexdigest())


def split_examples(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Return the examples to train on and those to evaluate on, drawn by ``seed``; both keep the file's order.

    share: of the latter, at least one example. Raises: BadInput when none would be left to train on.
    """
    count = len(examples.examples)
    held_out = max(1, round(count * share))
    if held_out >= count:
        raise BadInput(f"{examples.path}: expected more than {held_out} examples to hold out {share:g}, found {count}")
    chosen = set(random.Random(seed).sample(range(count), held_out))
    parts: tuple[list[Example], list[Example]] = ([], [])
    for place, example in enumerate(examples.examples):
        parts[place in chosen].append(example)
    train, evaluate = (replace(examples, examples=tuple(part)) for part in parts)
    return train, evaluate


def _lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    # Split on newlines only: other separators that str.splitlines knows may stand inside a JSON string.
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _parse(where: str, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise UnreadableFile(where, f"not UTF-8 at byte {exc.start + 1} of the line") from exc
    except (json.JSONDecodeError, RecursionError) as exc:
        reason = f"{exc.msg} at column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else "nested too deeply"
        raise UnreadableFile(where, f"not JSON: {reason}") from exc
    if not isinstance(entry, dict):
        raise BadInput(f"{where}: expected an object with {_WANTED}, found {_describe(entry)}")
    return entry


def _kind(where: str, entry: dict[str, Any]) -> str:
    kinds = [kind for kind, names in _KINDS.items() if any(name in entry for name in names)]
    if not kinds:
        found = ", ".join(map(repr, entry)) or "no field"
        raise BadInput(f"{where}: expected the field {_WANTED}, found {found}")
    if len(kinds) > 1:
        raise BadInput(f'{where}: expected one kind of example, found "{kinds[0]}" and "{kinds[1]}"')
    for name in _KINDS[kinds[0]]:
        if name not in entry:
            raise BadInput(f'{where}: expected the field "{name}" too, found {", ".join(map(repr, entry))}')
    return kinds[0]


def _string(where: str, name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise BadInput(f'{where}: expected "{name}" to be a non-empty string, found {_describe(value)}')
    return value


def _message_list(where: str, name: str, value: object) -> list[dict[str, Any]]:
    """Return the chat if it has a turn to learn: one of the assistant, with something before it."""
    if not isinstance(value, list) or not value:
        raise BadInput(f'{where}: expected "{name}" to be a list of messages, found {_describe(value)}')
    for place, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise BadInput(f"{where}: message {place}: expected an object, found {_describe(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _describe(message[key]) if key in message else "no such field"
                raise BadInput(f'{where}: message {place}: expected "{key}" to be a string, found {found}')
    if all(message["role"] != "assistant" for message in value):
        raise BadInput(f'{where}: expected a message with role "assistant" to learn from, found none')
    return value


def _describe(value: object) -> str:
    if isinstance(value, str):
        return "a string" if value else "an empty string"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names: dict[type, str] = {dict: "an object", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
