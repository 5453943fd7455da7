"""The fast and the careful reading of a header agree, and no unusual header is read differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.errors import UnreadableFile
from exporter.io import json_objects
from exporter.sources.hf import header
from exporter.sources.hf.header import Entry, header_entries
from exporter.tensors import TensorSpec

A = '"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}'
B = '"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}'
NOTE = '"note":[NaN]'
SECOND_SHAPE = '"shape":[6],"data_offsets"'
BOTH = [(0, 24, "a", TensorSpec("a", "F32", (2, 3))), (24, 32, "b", TensorSpec("b", "BF16", (4,)))]

#: Valid headers that both ways of reading must read alike. Some are only read by the careful one.
SAME = {
    "plain": f"{{{A},{B}}}",
    "spaces": f" {{ {A} ,\n {B} }}      ",
    "metadata": f'{{"__metadata__":{{"format":"pt"}},{A},{B}}}',
    "metadata with the name of a key": f'{{"__metadata__":{{"dtype":"float"}},{A},{B}}}',
    "metadata that is a number": f'{{"__metadata__":7,{A},{B}}}',
    "further keys": f"{{{A[:-1]},{NOTE}}},{B}}}",
    "escaped name": f"{{{A},{B}}}".replace('"b"', '"\\u0062"'),
    "escaped key": f"{{{A},{B}}}".replace("dtype", "d\\u0074ype"),
}


def read(text: str) -> list[Entry]:
    return header_entries(Path("x"), text.encode())


@pytest.mark.parametrize("case", SAME)
def test_valid_headers_are_read_alike(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(read(SAME[case])) == BOTH
    monkeypatch.setattr(header, "_ordinary", lambda text: None)
    assert sorted(read(SAME[case])) == BOTH


def test_a_plain_header_is_read_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "parse_object", None)
    assert sorted(read(SAME["metadata"])) == BOTH


def test_a_tensor_named_like_a_key_and_an_empty_tensor_are_read() -> None:
    named = {"dtype": {"dtype": "I8", "shape": [0, 5], "data_offsets": [3, 3]}}
    assert read(json.dumps(named)) == [(3, 3, "dtype", TensorSpec("dtype", "I8", (0, 5)))]
    assert read("{}") == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"{{{A},{A}}}", "a"),
        (f"{{{A},{A.replace('F32', 'I32')}}}", "a"),
        ("{" + A.replace('"data_offsets"', SECOND_SHAPE) + "}", "shape"),
        (f'{{"__metadata__":{{}},"__metadata__":{{}},{A}}}', "__metadata__"),
        (f'{{{A},"\\u0061":{{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}}}', "a"),
    ],
)
def test_a_key_that_occurs_twice_is_refused(text: str, name: str) -> None:
    with pytest.raises(UnreadableFile, match=f"{name}: expected a unique key, found the same key twice"):
        read(text)


def test_a_header_that_would_need_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_objects, "_MAX_MEMORY_BYTES", 1000)
    with pytest.raises(UnreadableFile, match="expected JSON that needs at most 0 MB of memory"):
        read(SAME["plain"])
