"""tokenizer.model is read as by the sentencepiece package; a broken file is refused with one line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from exporter.errors import UnreadableFile
from exporter.sources.hf.sentencepiece import SentencePieceModel, read_model
from fixtures.models.tokenizers import llama_sentencepiece, model_proto, t5_sentencepiece


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def content(request: pytest.FixtureRequest) -> bytes:
    return llama_sentencepiece() if request.param == "bpe" else t5_sentencepiece()


def read(folder: Path, content: bytes) -> SentencePieceModel:
    path = folder / "tokenizer.model"
    path.write_bytes(content)
    return read_model(path)


def test_every_field_is_that_of_the_sentencepiece_package(tmp_path: Path, content: bytes) -> None:
    ours, theirs = read(tmp_path, content), model_proto(content)
    assert ours.texts == [piece.piece for piece in theirs.pieces]
    assert ours.scores == [piece.score for piece in theirs.pieces]
    assert ours.types == [piece.type for piece in theirs.pieces]
    assert ours.algorithm == theirs.trainer_spec.model_type
    assert ours.treat_whitespace_as_suffix == theirs.trainer_spec.treat_whitespace_as_suffix
    assert ours.charsmap == theirs.normalizer_spec.precompiled_charsmap
    assert ours.add_dummy_prefix == theirs.normalizer_spec.add_dummy_prefix
    assert ours.remove_extra_whitespaces == theirs.normalizer_spec.remove_extra_whitespaces


def test_reordered_and_omitted_fields_are_read(tmp_path: Path) -> None:
    # type before text; then a piece with only a text, too long for a length of one byte
    pieces = b"\x0a\x08\x18\x03\x0a\x01a\x98\x06\x07" + b"\x0a\xcb\x01\x0a\xc8\x01" + b"b" * 200
    model = read(tmp_path, pieces)
    assert (model.texts, model.types, model.scores) == (["a", "b" * 200], [3, 1], [0.0, 0.0])
    assert (model.algorithm, model.add_dummy_prefix, model.remove_extra_whitespaces) == (1, True, True)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"", "expected a SentencePiece model with at least one piece"),
        (b"{}", "expected a SentencePiece model"),
        (b"\x0a\x05\x0a\x03ab", "expected a protobuf field of 5 bytes, found 4 bytes"),
        (b"\x0a\x03\x0a\x01\xff", "piece 0"),
        (b"\x0a\x02\x18\x09", "type 9"),
        (b"\x08\x01", "expected bytes in the protobuf field, found a number"),
        (b"\x0a" + b"\xff" * 11, "a varint of at most 10 bytes"),
        (b"\x0b", "unknown protobuf wire type 3"),
    ],
)
def test_a_broken_file_is_refused_by_its_name(tmp_path: Path, broken: bytes, message: str) -> None:
    with pytest.raises(UnreadableFile, match=r"tokenizer\.model: .*" + message):
        read(tmp_path, broken)


def test_mutated_files_are_read_or_refused_and_nothing_else(tmp_path: Path, content: bytes) -> None:
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(content[: generator.randrange(len(content))] if generator.random() < 0.3 else content)
        for _ in range(generator.randrange(1, 8)):
            data[generator.randrange(min(len(data), 4000) or 1) : 0] = bytes([generator.randrange(256)])
        try:
            read(tmp_path, bytes(data))
        except UnreadableFile:
            refused += 1
    assert refused > 200
