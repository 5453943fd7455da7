"""Hostile input for the whole program: it exits with 4 and one line, within a limit of memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import pytest

from fixtures.hostile.bombs import BOMBS, TOKENIZER, WHERE
from fixtures.hostile.cases import HOSTILE, MENTIONS
from fixtures.hostile.containers import CONTAINERS
from tests.support.processes import Ended, ttexport

#: Memory limit of a merge, of which the interpreter with numpy takes 40 MB.
PEAK_BYTES: Final = 300 << 20


def require_refused(ended: Ended, *mentions: str) -> None:
    assert ended.code == 4, ended.stderr
    assert ended.stderr.startswith("ttexport: ")
    assert ended.stderr.count("\n") == 1
    assert ended.peak_bytes < PEAK_BYTES
    for words in mentions:
        assert words.casefold() in ended.stderr.casefold()


# Merges of the tokenizer are read by the GGUF writer only; other formats copy the file.
@pytest.mark.parametrize("name", [*HOSTILE, *(name for name in BOMBS if name != "merges of lists")])
def test_a_merge_of_hostile_input_is_refused_within_bounds(
    name: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    adapter, base = (HOSTILE.get(name) or BOMBS[name])(tiny_adapter, tiny_tied, tmp_path / "in")
    ended = ttexport("merge", adapter, "--base", base, "-o", tmp_path / "out" / "x")
    require_refused(ended, *(MENTIONS.get(name) or [WHERE[name]]))
    assert not (tmp_path / "out" / "x").exists()
    shutil.rmtree(tmp_path / "in")  # pytest would keep up to 100 MB a case


@pytest.mark.parametrize("name", [name for name, where in WHERE.items() if where == TOKENIZER])
def test_a_hostile_tokenizer_is_refused_by_the_writer_that_needs_all_of_it(
    name: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    adapter, base = BOMBS[name](tiny_adapter, tiny_tied, tmp_path / "in")
    ended = ttexport("merge", adapter, "--base", base, "--to", "gguf", "-o", tmp_path / "out")
    require_refused(ended, TOKENIZER)
    shutil.rmtree(tmp_path / "in")


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_hostile_container_is_refused_within_bounds(name: str, tmp_path: Path) -> None:
    file, build = CONTAINERS[name]
    build(tmp_path / file)
    require_refused(ttexport("inspect", tmp_path / file if file.endswith("gguf") else tmp_path))
    (tmp_path / file).unlink()


def test_the_measurement_reports_memory_and_success(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    ended = ttexport("merge", tiny_adapter, "--base", tiny_tied, "-o", tmp_path / "x")
    assert ended.code == 0
    assert 20 << 20 < ended.peak_bytes < PEAK_BYTES
    with pytest.raises(AssertionError):
        require_refused(ended)
