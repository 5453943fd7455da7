"""Reads the file tokenizer.model, which contains a SentencePiece model as a protobuf message.

According to sentencepiece_model.proto, field 1 of the message is a vocabulary piece (subfields: 1 text, 2 float score,
3 type) and is repeated in the order of the token ids. Field 2 of the message contains the settings of the trainer
(subfields: 3 the algorithm, 24 whether whitespace is a suffix). Field 3 of the message contains the normalizer
(subfields: 2 the compiled character map, 3 whether to add a dummy prefix, 4 whether to remove extra whitespace). A
protobuf field with its default value is omitted from the file. The sentencepiece package is not used, because a GGUF
file needs only a few fields of the SentencePiece model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from exporter.errors import UnreadableFile
from exporter.io.files import read_file
from exporter.sources.varint import read_varint

#: Types of pieces. Source: SentencePiece.Type in sentencepiece_model.proto; llama.h has the same numbers.
NORMAL: Final = 1
UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5
BYTE: Final = 6

#: Algorithms. Source: TrainerSpec.ModelType.
UNIGRAM: Final = 1
BPE: Final = 2

_MAX_BYTES: Final = 256 << 20
_FLOAT: Final = struct.Struct("<f")


@dataclass
class SentencePieceModel:
    """The pieces of a SentencePiece model in the order of their ids, and the settings that affect tokenisation.

    texts, scores, types: lists with one item per piece. charsmap: the compiled character map of the normalizer, or b""
    if the normalizer has no character map.
    """

    algorithm: int = UNIGRAM
    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    treat_whitespace_as_suffix: bool = False


def read_model(path: Path) -> SentencePieceModel:
    """Parse ``path``.

    Raises UnreadableFile, naming the invalid field, if the file is truncated or is not a SentencePiece model.
    """
    data = read_file(path, max_nbytes=_MAX_BYTES)
    model, what = SentencePieceModel(), "message"
    try:
        for number, value in _fields(data):
            if number == 1:
                what = f"piece {len(model.texts)}"
                text, score, piece_type = _piece(_bytes(value))
                model.texts.append(text)
                model.scores.append(score)
                model.types.append(piece_type)
            elif number == 2:
                what = "trainer_spec"
                _trainer(model, _bytes(value))
            elif number == 3:
                what = "normalizer_spec"
                _normalizer(model, _bytes(value))
            what = "message"
    except (ValueError, IndexError, struct.error) as exc:  # UnicodeDecodeError is a ValueError
        raise UnreadableFile(
            path, f"{what}: expected a SentencePiece model, found another format or a truncated file ({exc})"
        ) from exc
    if not model.texts:
        raise UnreadableFile(path, "expected a SentencePiece model with at least one piece, found no piece")
    return model


def _piece(data: bytes) -> tuple[str, float, int]:
    """Parse the message of one vocabulary piece and return (text, score, type).

    If the fields of the piece have the usual order, the function parses the piece without a loop, which is faster.
    """
    if data and data[0] == 0x0A and data[1] < 0x80:
        end = 2 + data[1]
        tail = data[end:]
        if len(tail) == 5 and tail[0] == 0x15:
            return data[2:end].decode(), _FLOAT.unpack_from(tail, 1)[0], NORMAL
        if len(tail) == 7 and tail[0] == 0x15 and tail[5] == 0x18 and tail[6] <= BYTE:
            return data[2:end].decode(), _FLOAT.unpack_from(tail, 1)[0], tail[6]
    text, score, piece_type = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode()
        elif number == 2:
            score = _FLOAT.unpack(_bytes(value))[0]
        elif number == 3:
            piece_type = _number(value)
            if not NORMAL <= piece_type <= BYTE:
                raise ValueError(f"unknown piece type {piece_type}")
    return text, score, piece_type


def _trainer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 3:
            model.algorithm = _number(value)
        elif number == 24:
            model.treat_whitespace_as_suffix = bool(_number(value))


def _normalizer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 2:
            model.charsmap = _bytes(value)
        elif number == 3:
            model.add_dummy_prefix = bool(_number(value))
        elif number == 4:
            model.remove_extra_whitespaces = bool(_number(value))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) for every field of a protobuf message; the value is an int for a varint, else bytes.

    Source: protobuf's encoding guide.
    """
    at, size = 0, len(data)
    while at < size:
        key, at = (data[at], at + 1) if data[at] < 0x80 else read_varint(data, at, size)
        wire_type = key & 7
        if wire_type == 0:
            value, at = read_varint(data, at, size)
            yield key >> 3, value
            continue
        if wire_type == 2:
            length, at = (data[at], at + 1) if data[at] < 0x80 else read_varint(data, at, size)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"unknown protobuf wire type {wire_type}")
        if length > size - at:
            raise ValueError(f"expected a protobuf field of {length} bytes, found {size - at} bytes")
        yield key >> 3, data[at : at + length]
        at += length


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("expected bytes in the protobuf field, found a number")  # noqa: TRY004  (the file is wrong, not the caller)
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("expected a number in the protobuf field, found bytes")  # noqa: TRY004
    return value
