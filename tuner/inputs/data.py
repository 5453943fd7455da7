"""Read training examples from a JSON Lines file, in which all examples have the same type.

Every error about a line of the file names the line number. No torch is needed. Every line of a file has the same type,
which is ``{"text": …}``, ``{"prompt": …, "completion": …}``, or ``{"messages": [{"role": …, "content": …}]}``.
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

# Example type → fields of a line of the type. Other fields are ignored.
_FIELDS: Final = {"text": ("text",), "prompt": ("prompt", "completion"), "messages": ("messages",)}
_EXPECTED: Final = 'the field "text", the fields "prompt" and "completion", or the field "messages"'
# Maximum size of a line, enough for a text of millions of tokens. Parsing may take 40 times the size: 640 MB.
_MAX_LINE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    line: the line number in the file, counted from 1. values: the content of each field, for example the prompt and the
    completion.
    """

    line: int
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of a file, in the order of the file.

    example_type: ``text``, ``prompt`` or ``messages``.  digest: SHA-256 of the file's bytes, in hex.
    """

    path: Path
    example_type: str
    examples: tuple[Example, ...]
    digest: str


def read_examples(path: Path) -> Examples:
    """Read a JSONL file. Blank lines are skipped.

    Peak memory: the bytes of the file plus the parsed strings. Raises UnreadableFile with the line number if a line is
    not UTF-8 text, is not JSON or is longer than 16 MiB. Raises BadInput with the line number if fields are missing or
    have a wrong type, or if the example type differs from the type of the earlier lines. Raises BadInput with the file
    name if the file contains no example.
    """
    with reading(path):
        raw = path.read_bytes()
    example_type = ""
    examples: list[Example] = []
    for number, line in _lines(raw):
        where = f"{path}:{number}"
        entry = _parse(where, line)
        line_type = _type_of(where, entry)
        if example_type and line_type != example_type:
            first = examples[0].line
            raise BadInput(f'{where}: expected example type "{example_type}" as in line {first}, found "{line_type}"')
        example_type = line_type
        check = _message_list if example_type == "messages" else _string
        examples.append(Example(number, tuple(check(where, name, entry[name]) for name in _FIELDS[example_type])))
    if not examples:
        raise BadInput(f"{path}: expected at least one line with {_EXPECTED}, found only blank lines")
    return Examples(path, example_type, tuple(examples), hashlib.sha256(raw).hexdigest())


def split_examples(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Split the examples and return (training examples, evaluation examples).

    Evaluation examples are drawn at random with ``seed``. Training examples and evaluation examples keep the order of
    the file. share: fraction of the examples to use for evaluation (at least one example). Raises: BadInput if no
    example would remain for training.
    """
    count = len(examples.examples)
    held_out = max(1, round(count * share))
    if held_out >= count:
        raise BadInput(
            f"{examples.path}: expected more than {held_out} examples if --eval-share is {share:g}, found {count}"
        )
    chosen = set(random.Random(seed).sample(range(count), held_out))
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, example in enumerate(examples.examples):
        parts[index in chosen].append(example)
    train, evaluate = (replace(examples, examples=tuple(part)) for part in parts)
    return train, evaluate


def _lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    # The bytes are split only at newlines, because a JSON string may contain other separators of str.splitlines.
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _parse(where: str, line: bytes) -> dict[str, Any]:
    if len(line) > _MAX_LINE_BYTES:
        raise UnreadableFile(where, f"expected a line of at most {_MAX_LINE_BYTES} bytes, found {len(line)} bytes")
    try:
        entry = json.loads(line.decode("utf-8"))
        if b"\\u" in line:
            json.dumps(entry, ensure_ascii=False).encode("utf-8")  # no tokenizer accepts half of a surrogate pair
    except UnicodeEncodeError as exc:
        raise UnreadableFile(where, "expected valid Unicode text, found half of a surrogate pair") from exc
    except UnicodeDecodeError as exc:
        raise UnreadableFile(
            where, f"expected UTF-8, found an invalid byte at position {exc.start + 1} of the line"
        ) from exc
    except json.JSONDecodeError as exc:
        raise UnreadableFile(where, f"expected valid JSON, found an error at column {exc.colno}: {exc.msg}") from exc
    except (ValueError, RecursionError) as exc:  # the line has a number of more than 4300 digits, or deep nesting
        raise UnreadableFile(where, f"expected valid JSON, found an error: {exc}") from exc
    if not isinstance(entry, dict):
        raise BadInput(f"{where}: expected a JSON object with {_EXPECTED}, found {_describe(entry)}")
    return entry


def _type_of(where: str, entry: dict[str, Any]) -> str:
    types = [name for name, keys in _FIELDS.items() if any(key in entry for key in keys)]
    if not types:
        present = ", ".join(map(repr, entry)) or "no field"
        raise BadInput(f"{where}: expected {_EXPECTED}, found {present}")
    if len(types) > 1:
        raise BadInput(f'{where}: expected fields of one example type, found the types "{types[0]}" and "{types[1]}"')
    for key in _FIELDS[types[0]]:
        if key not in entry:
            present = ", ".join(map(repr, entry))
            raise BadInput(f'{where}: expected the field "{key}" in an example of type "{types[0]}", found {present}')
    return types[0]


def _string(where: str, name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise BadInput(f'{where}: "{name}": expected a non-empty string, found {_describe(value)}')
    return value


def _message_list(where: str, name: str, value: object) -> list[dict[str, Any]]:
    """Check a chat and return its messages.

    At least one message must be from the assistant, because only the assistant's messages are learned.
    """
    if not isinstance(value, list) or not value:
        raise BadInput(f'{where}: "{name}": expected a list of messages, found {_describe(value)}')
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise BadInput(f"{where}: message {number}: expected a JSON object, found {_describe(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                value_type = _describe(message[key]) if key in message else "no such field"
                raise BadInput(f'{where}: message {number}: "{key}": expected a string, found {value_type}')
    if all(message["role"] != "assistant" for message in value):
        raise BadInput(f'{where}: "{name}": expected at least one message with role "assistant", found no such message')
    return value


def _describe(value: object) -> str:
    if isinstance(value, str):
        return "a string" if value else "an empty string"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names: dict[type, str] = {dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
