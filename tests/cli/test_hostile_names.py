"""Names and texts from untrusted files on the terminal."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.cli.text import printable
from fixtures.hostile import rawtensors

Capture = pytest.CaptureFixture[str]
EVIL = "a[/]\x1b[2J\nb"


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf(path: Path) -> Path:
    """A file with one key, one text that is not UTF-8, and one tensor of 8 numbers."""
    key = string(b"some.[red]key") + struct.pack("<I", 8) + string(b"half \xff [/] \x1b[2J")
    tensor = string(EVIL.encode()) + struct.pack("<IQIQ", 1, 8, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + key + tensor
    path.write_bytes(head + bytes(-len(head) % 32 + 32))
    return path


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_inspect_prints_names_that_hold_control_characters(options: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert run(["inspect", str(gguf(tmp_path / "x.gguf")), *options]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "some.[red]key" in out
    if options:
        assert json.loads(out)["facts"]["some.[red]key"] == "half \udcff [/] \x1b[2J"
        assert json.loads(out)["tensors"][0]["name"] == EVIL
    else:
        assert "a[/]\\x1b[2J\\nb" in out


@pytest.mark.parametrize("name", [EVIL, "x" * 1_000_000], ids=["control characters", "a megabyte"])
def test_an_error_about_a_hostile_name_is_one_short_line(name: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text("{}")
    rawtensors.write(tmp_path / "model.safetensors", {name: {"dtype": "F32", "shape": [-1]}}, b"")
    assert run(["inspect", str(tmp_path)]) == 4
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "\x1b" not in stderr
    assert len(stderr) < 2_100


def test_ordinary_text_stays_as_it_is() -> None:
    assert printable("größe 灯台 [x]") == "größe 灯台 [x]"
    assert printable("\udc80\x1b\u2028") == "\\udc80\\x1b\\u2028"
