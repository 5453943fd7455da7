from __future__ import annotations

import hashlib
import json
from pathlib import Path

import click
import pytest

from exporter.cli.main import run
from exporter.cli.sizes import parse_size

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512MB", 512_000_000),
        ("2GiB", 2 << 30),
        ("1.5GB", 1_500_000_000),
        ("3 kB", 3000),
        ("4KiB", 4096),
        ("1tb", 10**12),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "512", "MB", "-1MB", "0MB", "0.1B", "1e3MB", "5 XB", "1,5GB", "9999999999GB"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected a size such as 512MB or 2GiB, found"):
        parse_size(text)


def test_a_bad_size_is_a_usage_error_that_names_the_option(capsys: Capture) -> None:
    assert run(["merge", "--memory", "lots"]) == 2
    assert "--memory': expected a size such as 512MB or 2GiB, found 'lots'" in capsys.readouterr().err


def test_shards_are_for_checkpoints_only(tiny_adapter: Path, capsys: Capture) -> None:
    assert run(["merge", str(tiny_adapter), "--to", "gguf", "--max-shard-size", "1MB"]) == 2
    assert "--max-shard-size: needs --to hf" in capsys.readouterr().err


def test_a_merge_splits_anew_and_is_verified(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "-o", str(tmp_path / "out"), "--verify", "full"]
    assert run([*argv, "--max-shard-size", "70kB"]) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2


@pytest.mark.parametrize("memory", ["1B", "1MiB", "8GiB"])
def test_the_memory_that_is_allowed_does_not_change_a_byte(
    memory: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "--dtype", "f32", "-q"]
    outs = [tmp_path / "default", tmp_path / "bounded"]
    assert run([*argv, "-o", str(outs[0])]) == 0
    assert run([*argv, "-o", str(outs[1]), "--memory", memory]) == 0
    one, other = ({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()} for out in outs)
    assert one == other
