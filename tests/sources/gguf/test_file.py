from __future__ import annotations

import ctypes
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exporter.errors import NotExpressible, TensorMismatch, UnreadableFile
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.types import SCALARS, TENSOR_TYPES


def string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, value_type: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", value_type) + value


def tensor(name: bytes, lengths: Sequence[int], ggml_type: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(lengths)}QIQ", len(lengths), *lengths, ggml_type, offset)


def container(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 0,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\1" * data


WORDS = struct.pack("<IQ", 8, 3) + string(b"one") + string(b"") + string("zwölf".encode())
VALID = container(
    [
        key(b"general.architecture", 8, string(b"llama")),
        key(b"a.number", 4, struct.pack("<I", 7)),
        key(b"a.float", 6, struct.pack("<f", 0.5)),
        key(b"a.flag", 7, b"\1"),
        key(b"some.words", 9, WORDS),
        key(b"some.numbers", 9, struct.pack("<IQ3i", 5, 3, -1, 0, 1)),
    ],
    [tensor(b"embd", (8, 3)), tensor(b"norm", (8,), offset=96), tensor(b"quantised", (64, 2), 8, 128)],
    128 + 136,
)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "file.gguf"
    path.write_bytes(data)
    return path


def test_values_and_tensors_are_read(tmp_path: Path) -> None:
    file = GgufFile.open(write(tmp_path, VALID))
    words, numbers = file.metadata.pop("some.words"), file.metadata.pop("some.numbers")  # type: ignore[attr-defined]
    assert file.metadata == {"general.architecture": "llama", "a.number": 7, "a.float": 0.5, "a.flag": True}
    assert words.values() == ["one", "", "zwölf"]
    assert numbers.values() == [-1, 0, 1]
    assert {name: (stored.type, stored.shape, stored.nbytes) for name, stored in file.tensors.items()} == {
        "embd": ("F32", (3, 8), 96),
        "norm": ("F32", (8,), 32),
        "quantised": ("Q8_0", (2, 64), 136),
    }
    assert file.tensors["embd"].offset_bytes == file.data_offset == len(VALID) - 264


def test_a_file_of_gguf_pys_writer_reads_as_in_gguf_pys_reader(tmp_path: Path) -> None:
    path, rng = tmp_path / "theirs.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", ["a", "", "灯台"])
    writer.add_array("floats", [0.5, -1.0])
    writer.add_float64("wide", 0.1)
    writer.add_int64("long", -(1 << 40))
    writer.add_custom_alignment(64)
    for name, shape in (("one", (5,)), ("two", (3, 64)), ("three", (2, 3, 32))):
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = GgufFile.open(path), gguf.GGUFReader(path)
    for name, value in ours.metadata.items():
        assert (value.values() if isinstance(value, GgufArray) else value) == theirs.fields[name].contents()
    assert list(ours.tensors) == [stored.name for stored in theirs.tensors]
    for stored in theirs.tensors:
        mine = ours.tensors[stored.name]
        assert (mine.offset_bytes, mine.shape) == (stored.data_offset, tuple(int(n) for n in stored.shape[::-1]))
        assert np.array_equal(
            ours.rows(stored.name, 0, mine.n_rows).reshape(-1), stored.data.reshape(-1).view(np.uint8)
        )


def test_type_tables_are_ggmls() -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    (path,) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so")
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_type_size.restype, ggml.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    ggml.ggml_type_name.restype = ctypes.c_char_p
    for number, (name, block, nbytes) in TENSOR_TYPES.items():
        # ggml's own names differ in letter case only: f32, q4_K.
        assert ggml.ggml_type_name(number).decode().upper() == name
        assert (ggml.ggml_blck_size(number), ggml.ggml_type_size(number)) == (block, nbytes)


def test_value_types_are_ggufs() -> None:
    assert {value_type.value for value_type in gguf.GGUFValueType} == {*SCALARS, 8, 9}


@pytest.mark.parametrize("ggml_type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "IQ4_NL", "Q4_K", "Q6_K"])
def test_rows_are_dequantised_as_in_gguf_py(tmp_path: Path, ggml_type: str) -> None:
    enum = GGMLQuantizationType[ggml_type]
    block, nbytes = gguf.GGML_QUANT_SIZES[enum]
    width = max(block, 256)
    # Bytes below 0x40 keep every float16 and bfloat16 scale finite.
    raw = np.random.default_rng(1).integers(0, 0x40, (4, width // block * nbytes), np.uint8)
    head = container([], [tensor(b"t", (width, 4), enum.value)])
    file = GgufFile.open(write(tmp_path, head + raw.tobytes()))
    assert np.array_equal(file.rows("t", 1, 3), raw[1:3])
    got = file.dequantize_rows("t", 1, 3)
    assert got.dtype == np.float32
    assert np.array_equal(got, quants.dequantize(raw[1:3], enum))


def test_type_without_a_decoder_is_refused(tmp_path: Path) -> None:
    file = GgufFile.open(write(tmp_path, container([], [tensor(b"t", (256,), 15)], 292)))
    with pytest.raises(NotExpressible, match="Q8_K"):
        file.dequantize_rows("t", 0, 1)


@pytest.mark.parametrize(("name", "start", "stop"), [("none", 0, 1), ("embd", 0, 4), ("embd", -1, 1), ("embd", 2, 1)])
def test_rows_out_of_range_are_refused(tmp_path: Path, name: str, start: int, stop: int) -> None:
    with pytest.raises(TensorMismatch, match=name):
        GgufFile.open(write(tmp_path, VALID)).rows(name, start, stop)


ONE = tensor(b"t", (8,))
HOSTILE = {
    "empty": (b"", "0 bytes"),
    "short": (VALID[:20], "20 bytes"),
    "another magic": (container(magic=b"GGML"), "magic"),
    "version 1": (container(version=1), "version"),
    "big-endian": (container(version=0x03000000), "big-endian"),
    "huge number of keys": (container(n_keys=1 << 60), "do not fit"),
    "huge number of tensors": (container(n_tensors=(1 << 64) - 1), "do not fit"),
    "more keys than any model": (
        container([key(b"k", 0, b"\0")] * 4097),
        "at most 65536 tensors and 4096 metadata keys",
    ),
    "more tensors than any model": (
        container([], [tensor(b"t", (8,))] * 65537),
        "found 65537 tensors and 0 metadata keys",
    ),
    "text without end": (container([key(b"k", 8, string(b"x" * (17 << 20)))]), "k: expected at most 16777216 bytes of"),
    "strings without end": (
        container([key(b"k", 9, struct.pack("<IQ", 8, (2 << 20) + 1) + bytes(17 << 20))]),
        "k: expected an array of at most 2097152 strings",
    ),
    "key longer than the file": (container([struct.pack("<Q", 60000) + b"x" * 40]), "60000 more header bytes"),
    "key of no length": (container([key(b"", 4, b"\0" * 4)]), "found 0"),
    "key of huge length": (container([struct.pack("<Q", 1 << 63) + b"x" * 40]), "name of 1 to"),
    "key not UTF-8": (container([key(b"\xff\xfe", 4, b"\0" * 4)]), "UTF-8"),
    "key twice": (container([key(b"k", 4, b"\0" * 4)] * 2), "k: expected a unique metadata key"),
    "unknown value type": (container([key(b"k", 13, b"\0" * 8)]), "k: expected a metadata value type"),
    "flag of 2": (container([key(b"k", 7, b"\2")]), "0 or 1 for a boolean"),
    "string of huge length": (container([key(b"k", 8, struct.pack("<Q", 1 << 62))]), "k: expected"),
    "array of arrays": (container([key(b"k", 9, struct.pack("<IQ", 9, 1) + b"\0" * 32)]), "found item type 9"),
    "huge array of numbers": (container([key(b"k", 9, struct.pack("<IQ", 12, 1 << 61))]), "k: expected"),
    "huge array of strings": (
        container([key(b"k", 9, struct.pack("<IQ", 8, 1 << 61))]),
        "an array of 2305843009213693952 strings does not fit",
    ),
    "string array beyond the file": (
        container([key(b"k", 9, struct.pack("<IQ", 8, 2) + string(b"a") + struct.pack("<Q", 1 << 63))]),
        "the strings of the array extend past",
    ),
    "alignment 0": (container([key(b"general.alignment", 4, struct.pack("<I", 0))]), "power of two, found 0"),
    "alignment 48": (container([key(b"general.alignment", 4, struct.pack("<I", 48))]), "power of two, found 48"),
    "alignment a word": (container([key(b"general.alignment", 8, string(b"32"))]), "power of two, found '32'"),
    "tensor name too long": (container([], [tensor(b"t" * 65, (8,))], 32), "1 to 64"),
    "tensor twice": (container([], [ONE, tensor(b"t", (8,), offset=32)], 64), "t: expected a unique tensor name"),
    "no axes": (container([], [tensor(b"t", ())], 32), "found 0"),
    "five axes": (container([], [tensor(b"t", (1,) * 5)], 32), "found 5"),
    "axis of no length": (container([], [tensor(b"t", (0, 4))], 32), "lengths of 1 or more"),
    "more elements than numbers": (container([], [tensor(b"t", (1 << 40, 1 << 40))], 32), "lengths of 1 or more"),
    "type 36": (container([], [tensor(b"t", (32,), 36)], 64), "number 36"),
    "half a block": (container([], [tensor(b"t", (48,), 8)], 64), "divisible by 32"),
    "data cut": (container([], [ONE], 31), "truncated"),
    "offset beyond the file": (container([], [tensor(b"t", (8,), offset=1 << 62)], 32), "offset 0"),
    "hole": (
        container([], [ONE, tensor(b"u", (8,), offset=64)], 96),
        "u: expected tensor data at offset 32, found offset 64",
    ),
    "overlap": (
        container([], [ONE, tensor(b"u", (8,), offset=0)], 64),
        "u: expected tensor data at offset 32, found offset 0",
    ),
    "unaligned": (
        container([], [ONE, tensor(b"u", (8,), offset=33)], 96),
        "u: expected tensor data at offset 32, found offset 33",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    data, reason = HOSTILE[name]
    path = write(tmp_path, data)
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableFile) as caught:
            GgufFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(UnreadableFile):
            GgufFile.open(path)


@pytest.mark.parametrize("length", range(0, len(VALID), 7))
def test_every_truncation_is_detected(tmp_path: Path, length: int) -> None:
    with pytest.raises(UnreadableFile):
        GgufFile.open(write(tmp_path, VALID[:length]))


@pytest.mark.slow
@pytest.mark.no_cover  # 10,000 files of a few lines each: twice the time, and no other line
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(VALID) - 300), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4
    )
)
@example(changes=[(16, b"\xff" * 8)])
@settings(
    max_examples=10_000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_mutated_header_reads_or_is_refused(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(VALID)
    for at, new in changes:
        data[at : at + len(new)] = new
    path = write(tmp_path, bytes(data))
    try:
        file = GgufFile.open(path)
    except UnreadableFile:
        return
    for stored in file.tensors.values():
        assert stored.offset_bytes + stored.nbytes <= len(data)
        assert file.rows(stored.name, 0, stored.n_rows).nbytes == stored.nbytes
    for value in file.metadata.values():
        if isinstance(value, GgufArray):
            assert len(value.values()) == value.count


def test_a_large_vocabulary_is_not_decoded_by_opening(tmp_path: Path) -> None:
    count = 150_000
    words = struct.pack("<IQ", 8, count) + b"".join(string(b"token%d" % index) for index in range(count))
    path = write(tmp_path, container([key(b"tokens", 9, words)], [ONE], 32))
    tracemalloc.start()
    try:
        file = GgufFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    tokens = file.metadata["tokens"].values()
    assert (tokens[0], tokens[-1], len(tokens)) == ("token0", "token149999", count)
