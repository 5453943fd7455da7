from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from exporter.errors import BadInput, UnreadableFile
from tuner.inputs.data import read_examples, split_examples

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def written(tmp_path: Path, raw: bytes) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(raw)
    return path


def test_examples_are_read_in_order_and_the_bytes_are_digested(tmp_path: Path) -> None:
    raw = '\ufeff{"text": "a\u2028b"}\r\n\n{"id": 7, "text": "é"}'.encode()
    examples = read_examples(written(tmp_path, raw))
    assert [(example.line, example.values) for example in examples.examples] == [(1, ("a\u2028b",)), (3, ("é",))]
    assert (examples.example_type, examples.digest) == ("text", hashlib.sha256(raw).hexdigest())


def test_prompts_and_chats_are_example_types_of_their_own(tmp_path: Path) -> None:
    examples = read_examples(written(tmp_path, b'{"completion": "b", "prompt": "a"}'))
    assert (examples.example_type, examples.examples[0].values) == ("prompt", ("a", "b"))
    examples = read_examples(written(tmp_path, json.dumps(CHAT).encode()))
    assert (examples.example_type, examples.examples[0].values) == ("messages", (CHAT["messages"],))


USER = b'{"role": "user", "content": "a"}'


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        (
            b'{"text": "a"}\n{"text": ',
            UnreadableFile,
            r"data.jsonl:2: expected valid JSON, found an error at column 10: Expecting value",
        ),
        (b'{"text": "a"}\n\n{"text": "\xff"}', UnreadableFile, r"data.jsonl:3: expected UTF-8"),
        (b"[" * 100_000, UnreadableFile, r"data.jsonl:1: expected valid JSON, found an error"),
        (
            b'{"text": %b}' % (b"1" * 5000),
            UnreadableFile,
            r"data.jsonl:1: expected valid JSON, found an error: Exceeds the limit \(4300 digits\)",
        ),
        (
            b'{"text": "\\ud83d"}',
            UnreadableFile,
            r"data.jsonl:1: expected valid Unicode text, found half of a surrogate",
        ),
        (
            b'{"text": "%b"}' % (b"a" * (16 << 20)),
            UnreadableFile,
            r"data.jsonl:1: expected a line of at most 16777216 bytes",
        ),
        (b'["text"]', BadInput, r"data.jsonl:1: expected a JSON object .* found a list"),
        (b'{"test": "a"}', BadInput, r"data.jsonl:1: expected the field \"text\", the fields .*, found 'test'"),
        (b"{}", BadInput, r"found no field"),
        (b'{"text": 5}', BadInput, r"data.jsonl:1: .* found a number"),
        (b'{"text": ""}', BadInput, r"data.jsonl:1: .* found an empty string"),
        (b"\n \n", BadInput, r"data.jsonl: expected at least one line with .* found only blank lines"),
        (
            b'{"text": "a"}\n\n{"prompt": "a", "completion": "b"}',
            BadInput,
            r':3: expected example type "text" as in line 1',
        ),
        (b'{"text": "a", "messages": []}', BadInput, r':1: .* one example type, found the types "text" and "messages"'),
        (b'{"prompt": "a"}', BadInput, r':1: expected the field "completion" in an example of type "prompt"'),
        (b'{"completion": "a"}', BadInput, r':1: expected the field "prompt" in an example of type "prompt"'),
        (b'{"messages": "a"}', BadInput, r"list of messages, found a string"),
        (b'{"messages": []}', BadInput, r"list of messages, found an empty list"),
        (b'{"messages": ["a"]}', BadInput, r"message 1: expected a JSON object, found a string"),
        (
            b'{"messages": [%b, {"role": "user"}]}' % USER,
            BadInput,
            r'message 2: "content": .* found no such field',
        ),
        (
            b'{"messages": [{"role": null, "content": ""}]}',
            BadInput,
            r'"role": expected a string, found null',
        ),
        (b'{"messages": [%b]}' % USER, BadInput, r'at least one message with role "assistant", found no such message'),
    ],
)
def test_broken_lines_are_named_by_number(raw: bytes, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        read_examples(written(tmp_path, raw))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"none\.jsonl: no such file"):
        read_examples(tmp_path / "none.jsonl")


def test_a_split_is_disjoint_complete_and_drawn_by_the_seed(tmp_path: Path) -> None:
    examples = read_examples(written(tmp_path, b"".join(b'{"text": "%d"}\n' % i for i in range(20))))
    train, held_out = split_examples(examples, 0.25, seed=3)
    assert len(held_out.examples) == 5
    assert sorted(train.examples + held_out.examples, key=lambda example: example.line) == list(examples.examples)
    assert split_examples(examples, 0.25, seed=3)[1] == held_out
    assert split_examples(examples, 0.25, seed=4)[1] != held_out
    assert len(split_examples(examples, 0.001, seed=0)[1].examples) == 1


def test_a_split_leaves_something_to_train_on(tmp_path: Path) -> None:
    examples = read_examples(written(tmp_path, b'{"text": "a"}'))
    with pytest.raises(BadInput, match=r"expected more than 1 examples if --eval-share is 0\.5, found 1"):
        split_examples(examples, 0.5, seed=0)
