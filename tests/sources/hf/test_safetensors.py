from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load, save_file

from exporter.errors import UnreadableFile
from exporter.sources.hf.safetensors import prepare, read_tensors
from exporter.tensors import DTYPES, Array, ByteRange, TensorSpec, read
from fixtures.hostile import rawtensors
from tests.sources.mutations import mutated

# The dtypes of both the library and numpy, without ml_dtypes.
NATIVE = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


def filled(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 2, shape).astype(DTYPES[dtype])


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def written(path: Path, header: Mapping[str, Any], nbytes: int, claim: int | None = None) -> Path:
    rawtensors.write(path, dict(header), bytes(nbytes), claim=claim)
    return path


def test_a_file_of_the_library_is_read_back(tmp_path: Path) -> None:
    tensors = {f"{dtype}.{n}": filled(dtype, shape) for dtype in NATIVE for n, shape in enumerate([(3, 2), (), (0, 4)])}
    save_file(tensors, tmp_path / "x.safetensors", {"note": "ignored"})
    stored = read_tensors(tmp_path / "x.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in stored.items():
        assert tensor.spec == TensorSpec(name, name.split(".")[0], tensors[name].shape)
        np.testing.assert_array_equal(read(tensor), tensors[name])
        if tensor.spec.shape == (3, 2):
            np.testing.assert_array_equal(tensor.rows(1, 3), tensors[name][1:3])


def test_a_prepared_header_is_read_by_the_library(tmp_path: Path) -> None:
    specs = [TensorSpec(f"{dtype} é", dtype, (3, 5)) for dtype in NATIVE] + [TensorSpec("empty", "F32", (0,))]
    header, places = prepare(specs, {"format": "pt"})
    values = {spec.name: filled(spec.dtype, spec.shape, seed) for seed, spec in enumerate(specs)}
    assert len(header) % 8 == 0
    content = bytearray(header)
    for spec, offset_bytes in places:
        assert offset_bytes == len(content)
        assert offset_bytes % DTYPES[spec.dtype].itemsize == 0
        content += values[spec.name].tobytes()
    loaded = load(bytes(content))
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(loaded[name], value)
    (tmp_path / "x").write_bytes(content)
    with safe_open(tmp_path / "x", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_keep_their_order_within_an_item_size() -> None:
    names = [("c", "I8"), ("b", "F32"), ("a", "F32"), ("d", "BF16"), ("e", "I8")]
    _, places = prepare([TensorSpec(name, dtype, (2,)) for name, dtype in names])
    assert [spec.name for spec, _ in places] == ["b", "a", "d", "c", "e"]


@given(st.integers(0, 1 << 40).map(lambda n: 8 * n))
def test_data_begins_at_the_same_offset_within_a_page_as_in_another_file(offset: int) -> None:
    specs = [TensorSpec("a", "F32", (2,))]
    header, places = prepare(specs, like_offset_bytes=offset)
    assert places == [(specs[0], len(header))]
    assert not offset or (len(header) - offset) % 4096 == 0
    assert len(header) < 4096 + 100


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b: expected tensor data at offset 8, found offset 12"),
    "hole at the start": ({"a": entry(4, 12)}, 12, "a: expected tensor data at offset 0, found offset 4"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b: expected tensor data at offset 8, found offset 4"),
    "shared": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "b: expected tensor data at offset 8, found offset 0"),
    "truncated": ({"a": entry(0, 8)}, 7, "a: .*up to byte 8, found only 7"),
    "trailing bytes": ({"a": entry(0, 8)}, 9, "expected 8 bytes of tensor data, found 9 bytes"),
    "shape and offsets": (
        {"a": entry(0, 8, shape=(3,))},
        8,
        r"a: expected 12 bytes for dtype F32 and shape \[3\], found 8 bytes",
    ),
    "backwards": ({"a": entry(8, 0)}, 8, "a: expected 8 bytes"),
    "no entry": ({"a": 5}, 0, "a: expected dtype, shape and data_offsets"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "a: expected dtype"),
    "unknown dtype": ({"a": entry(0, 8, dtype="F128")}, 8, "a: expected one of the dtypes .*'F128'"),
    "dtype that is a list": ({"a": entry(0, 8, dtype=["F32"])}, 8, "a: expected one of the dtypes"),
    "negative length": ({"a": entry(0, 8, shape=(-2,))}, 8, "a: expected a shape .*-2"),
    "fraction": ({"a": entry(0, 8, shape=(2.0,))}, 8, "a: expected a shape"),
    "boolean": ({"a": entry(0, 4, shape=(True,))}, 4, "a: expected a shape"),
    "shape that is a string": ({"a": entry(0, 8, shape="2")}, 8, "a: expected a shape"),
    "length beyond 63 bits": ({"a": entry(0, 8, shape=(1 << 63,))}, 8, "a: expected a shape"),
    "product that would wrap": ({"a": entry(0, 0, shape=(1 << 62, 1 << 62))}, 0, "a: expected a tensor of at most"),
    "absurd without data": ({"a": entry(0, 0, shape=(1 << 62, 0))}, 0, "a: expected a tensor of at most"),
    "more axes than numpy has": ({"a": entry(0, 4, shape=(1,) * 65)}, 4, "a: expected a tensor of at most 64 axes"),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "a: expected data_offsets"),
    "negative offset": ({"a": entry(-8, 0)}, 8, "a: expected data_offsets"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_header_is_refused_by_file_and_tensor(case: str, tmp_path: Path) -> None:
    header, nbytes, message = REFUSED[case]
    path = written(tmp_path / "x.safetensors", header, nbytes)
    with pytest.raises(UnreadableFile, match=message) as caught:
        read_tensors(path)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found a file of only 0 bytes"),
        (b"\x08\0\0", "found a file of only 3 bytes"),
        (struct.pack("<Q", 9) + b"{}      ", "expected a header of at most 8 bytes, found a header length of 9"),
        (
            struct.pack("<Q", 2**64 - 1) + b"{}",
            "expected a header of at most 2 bytes, found a header length of 18446744073709551615",
        ),
        (struct.pack("<Q", 0), "not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "expected a JSON object, found list"),
        (struct.pack("<Q", 3) + b"{,}", "not valid JSON"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not valid JSON"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "not valid JSON"),
        (struct.pack("<Q", 15) + b'{"a":{},"a":{}}', "a: expected a unique key, found the same key twice"),
        (struct.pack("<Q", 13) + rb'{"\udc80":{}}', "not valid JSON"),
    ],
    ids=lambda value: f"{value[:12]!r}" if isinstance(value, bytes) else "",
)
def test_a_file_without_a_header_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UnreadableFile, match=message):
        read_tensors(tmp_path / "x")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="no such file"):
        read_tensors(tmp_path / "absent")
    with pytest.raises(UnreadableFile, match="directory"):
        read_tensors(tmp_path)


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x", {"a": entry(0, 8)}, 8)
    tensor = read_tensors(path)["a"]
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(UnreadableFile, match="ends 3 bytes before"):
        read(tensor)


def test_a_tensor_is_one_range_of_its_file(tmp_path: Path) -> None:
    path = written(tmp_path / "x", {"a": entry(0, 8), "b": entry(8, 16)}, 16)
    size = path.stat().st_size
    assert list(read_tensors(path)["b"].segments()) == [ByteRange(path, size - 8, 8)]


def test_a_claim_of_an_enormous_header_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 33))
        file.truncate(1 << 34)  # sparse: the claim alone would fit the file
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from exporter.errors import UnreadableFile
from exporter.sources.hf.safetensors import read_tensors
try:
    read_tensors(__import__("pathlib").Path({str(path)!r}))
except UnreadableFile as exc:
    print(exc)
"""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "expected a header of at most 100000000 bytes, found a header length of 8589934592" in done.stdout


def valid() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry(0, 8),
        "bb": entry(8, 20, "BF16", (3, 2)),
        "c": entry(20, 20, shape=(0,)),
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(20)


def honest_length(content: bytearray) -> None:
    content[:8] = struct.pack("<Q", max(0, len(content) - 8 - 20))


@pytest.mark.slow
@pytest.mark.no_cover  # 10,000 files of a few lines each: twice the time, and no other line
@settings(
    max_examples=10_000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=mutated(valid(), honest_length))
def test_a_mutated_file_is_read_in_full_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    try:
        tensors = read_tensors(path)
    except UnreadableFile:
        return
    header = 8 + struct.unpack_from("<Q", content)[0]
    assert sum(tensor.place.nbytes for tensor in tensors.values()) == len(content) - header
    for tensor in tensors.values():
        assert read(tensor).tobytes() == content[tensor.place.offset_bytes :][: tensor.spec.nbytes]
    again, places = prepare([tensor.spec for tensor in tensors.values()])
    assert len(places) == len(tensors)
    assert again
