from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exporter.errors import BadInput, NotExpressible, UnreadableFile
from tuner.data import encode_texts, read_texts
from tuner.train import collate


def written(tmp_path: Path, raw: bytes) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(raw)
    return path


def test_texts_are_read_in_order_and_the_bytes_are_digested(tmp_path: Path) -> None:
    raw = '\ufeff{"text": "a\u2028b"}\r\n\n{"id": 7, "text": "é"}'.encode()
    texts = read_texts(written(tmp_path, raw))
    assert texts.texts == ("a\u2028b", "é")
    assert texts.digest == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (b'{"text": "a"}\n{"text": ', UnreadableFile, r"data.jsonl:2: not JSON: .* at column"),
        (b'{"text": "a"}\n\n{"text": "\xff"}', UnreadableFile, r"data.jsonl:3: not UTF-8"),
        (b"[" * 100_000, UnreadableFile, r"data.jsonl:1: not JSON"),
        (b'["text"]', BadInput, r"data.jsonl:1: expected an object .* found a list"),
        (b'{"test": "a"}', BadInput, r"data.jsonl:1: expected the field \"text\", found 'test'"),
        (b"{}", BadInput, r"found no field"),
        (b'{"text": 5}', BadInput, r"data.jsonl:1: .* found a number"),
        (b'{"text": ""}', BadInput, r"data.jsonl:1: .* found an empty string"),
        (b"\n \n", BadInput, r"data.jsonl: expected lines like .* found none"),
        (b'{"messages": []}', NotExpressible, r"data.jsonl:1 has \"messages\"; only \"text\" lines are read"),
        (b'{"prompt": "a", "completion": "b"}', NotExpressible, r"has \"prompt\""),
    ],
)
def test_broken_lines_are_named_by_number(raw: bytes, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        read_texts(written(tmp_path, raw))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"none\.jsonl: no such file"):
        read_texts(tmp_path / "none.jsonl")


def test_the_end_token_is_added_once_and_long_texts_are_cut() -> None:
    class Fake(SimpleNamespace):
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    texts = ["ab", "a\x00", "abcd"]
    assert encode_texts(Fake(eos_token_id=0), texts, 4) == ([[97, 98, 0], [97, 0], [97, 98, 99, 100]], 1)
    assert encode_texts(Fake(eos_token_id=None), ["ab"], 4) == ([[97, 98]], 0)


def test_batches_are_padded_on_the_right_and_padding_has_no_label() -> None:
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], padding_id=6)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 6, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["labels"].dtype == torch.int64
