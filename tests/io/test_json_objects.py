from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.errors import UnreadableFile
from exporter.io.json_objects import parse_object, read_object

WHERE = Path("config.json")


def test_json_beyond_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}')
    with pytest.raises(UnreadableFile, match="expected a file of at most 7 bytes, found 8 bytes"):
        read_object(path, max_nbytes=7)
    assert read_object(path, max_nbytes=8) == {"a": 1}


def test_a_repeated_key_is_found_among_many() -> None:
    # A search by counting each name would take hours here.
    names = ",".join(f'"{n}":0' for n in range(200_000))
    with pytest.raises(UnreadableFile, match="7: expected a unique key, found the same key twice"):
        parse_object(WHERE, f'{{{names},"7":0}}'.encode(), what="table")


@pytest.mark.parametrize("deep", ["[", '{"a":'])
def test_nesting_is_accepted_to_a_depth_that_can_be_copied(deep: str) -> None:
    def nested(levels: int) -> bytes:
        return (deep * levels + "1" + {"[": "]"}.get(deep, "}") * levels).encode()

    assert parse_object(WHERE, b'{"a":' + nested(62) + b"}", what="config")
    for levels in (64, 600, 100_000):
        with pytest.raises(UnreadableFile, match=r"expected at most 64 levels|not valid JSON: maximum recursion"):
            parse_object(WHERE, b'{"a":' + nested(levels) + b"}", what="config")


@pytest.mark.parametrize("item", ["[]", "{}", '"a"', "[[]]", '{"a":{}}', "1.5"])
def test_few_bytes_of_many_values_are_not_parsed(item: str) -> None:
    text = '{"a":[' + ",".join([item] * 3_000_000) + "]}"
    with pytest.raises(
        UnreadableFile, match="expected JSON that needs at most 128 MB of memory, found JSON that may need"
    ):
        parse_object(WHERE, text.encode(), what="config")


def test_one_wide_character_multiplies_the_memory_of_a_long_text() -> None:
    narrow = json.dumps({"a": "x" * (20 << 20)}).encode()
    assert parse_object(WHERE, narrow, what="config")
    for wide in ("\U0001f600".encode(), rb"\ud83d\ude00"):
        with pytest.raises(UnreadableFile, match=r"may need 1[0-9][0-9] MB"):
            parse_object(WHERE, narrow.replace(b"xx", wide, 1), what="config")
