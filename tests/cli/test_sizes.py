from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from exporter.cli.main import run

Capture = pytest.CaptureFixture[str]


def test_a_bad_size_is_a_usage_error_that_names_the_option(capsys: Capture) -> None:
    assert run(["merge", "--memory", "lots"]) == 2
    assert "--memory': expected a size such as 500M, 2GB or 1.5GiB, found 'lots'" in capsys.readouterr().err


def test_shards_are_for_checkpoints_only(tiny_adapter: Path, capsys: Capture) -> None:
    assert run(["merge", str(tiny_adapter), "--to", "gguf", "--max-shard-size", "1MB"]) == 2
    assert "--max-shard-size: needs --to hf" in capsys.readouterr().err


@pytest.mark.models
def test_a_merge_splits_the_weights_again_and_is_verified(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "-o", str(tmp_path / "out"), "--verify", "full"]
    assert run([*argv, "--max-shard-size", "70kB"]) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2


@pytest.mark.parametrize("memory", ["1B", "1MiB", "8GiB"])
def test_the_memory_limit_does_not_change_a_byte(
    memory: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "--dtype", "f32", "-q"]
    outs = [tmp_path / "default", tmp_path / "bounded"]
    assert run([*argv, "-o", str(outs[0])]) == 0
    assert run([*argv, "-o", str(outs[1]), "--memory", memory]) == 0
    default, bounded = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()} for out in outs
    )
    assert default == bounded
