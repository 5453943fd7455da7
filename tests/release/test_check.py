from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from exporter.cli.main import run
from exporter.errors import UnreadableFile
from exporter.release.check import check_release


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> Path:
    """A release to tamper with."""
    return shutil.copytree(finished, tmp_path / "release")


def failures(folder: Path) -> dict[str, str]:
    return {check.name: check.detail for check in check_release(folder).failures}


def test_a_release_is_as_released_from_the_command_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(finished), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["passed"]
    assert [one["name"] for one in document["artifacts"][0]["skipped"]] == ["signature"]


def test_a_flipped_bit_in_any_file_is_found(mine: Path) -> None:
    for path in sorted(path for path in mine.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for at in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert run(["verify", str(mine), "-q"]) in ((3, 4) if path.name == "manifest.json" else (3,)), (path, at)
        path.write_bytes(content)
    assert failures(mine) == {}


@pytest.mark.slow
def test_every_line_of_the_manifest_counts(mine: Path) -> None:
    path = mine / "manifest.json"
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        middle = len(line) // 2
        for other in (b"", line + line, line[:middle] + bytes([line[middle] ^ 1]) + line[middle + 1 :]):
            path.write_bytes(b"".join([*lines[:number], other, *lines[number + 1 :]]))
            try:
                assert failures(mine), (number, other)
            except UnreadableFile:
                assert run(["verify", str(mine), "-q"]) == 4
