from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from exporter.cli.main import run
from fixtures import adapters as stock
from tests.support.trained import TRAINED_IDS

WithEos = Callable[[str], Path]


@pytest.fixture
def with_eos(tiny_tied: Path, tmp_path: Path) -> WithEos:
    """Makes an adapter with another eos token in its tokenizer, as chat models have."""

    def make(eos_token: str) -> Path:
        folder = stock.stock_rows(tiny_tied, tmp_path / "adapter", TRAINED_IDS)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = eos_token
        tokenizer.save_pretrained(folder)
        return folder

    return make


def configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config, generation = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    return config, generation


def test_a_new_eos_token_is_set_in_both_configs(with_eos: WithEos, tiny_tied: Path, tmp_path: Path) -> None:
    adapter = with_eos("<|endoftext|>")
    token_id = AutoTokenizer.from_pretrained(adapter).eos_token_id
    assert token_id != AutoTokenizer.from_pretrained(tiny_tied).eos_token_id
    out = tmp_path / "out"
    assert run(["merge", str(adapter), "--base", str(tiny_tied), "-o", str(out)]) == 0
    config, generation = configs(out)
    assert config["eos_token_id"] == generation["eos_token_id"] == token_id
    assert GenerationConfig.from_pretrained(out).eos_token_id == token_id
    base_config, _ = configs(tiny_tied)
    assert {key for key in config if config[key] != base_config[key]} == {"eos_token_id"}


def test_a_list_of_eos_ids_keeps_its_other_members(with_eos: WithEos, tiny_tied: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_tied.iterdir():
        (base / path.name).symlink_to(path)
    (base / "generation_config.json").unlink()
    old = AutoTokenizer.from_pretrained(tiny_tied).eos_token_id
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [old, 9]}))
    adapter, out = with_eos("<|endoftext|>"), tmp_path / "out"
    assert run(["merge", str(adapter), "--base", str(base), "-o", str(out)]) == 0
    _, generation = configs(out)
    assert generation["eos_token_id"] == [AutoTokenizer.from_pretrained(adapter).eos_token_id, 9]


def test_the_same_tokenizer_leaves_the_generation_config_unchanged(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(["merge", str(tiny_adapter), "--base", str(tiny_tied), "-o", str(out)]) == 0
    name = "generation_config.json"
    assert (out / name).read_bytes() == (tiny_tied / name).read_bytes()


def test_the_checker_detects_a_special_id_that_was_not_updated(
    with_eos: WithEos, tiny_tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = with_eos("<|endoftext|>"), tmp_path / "out"
    assert run(["merge", str(adapter), "--base", str(tiny_tied), "-o", str(out)]) == 0
    checking = ["verify", str(out), "--reference", str(tiny_tied), "--adapter", str(adapter), "--level", "rows"]
    assert run(checking) == 0
    path = out / "generation_config.json"
    path.write_bytes((tiny_tied / path.name).read_bytes())
    assert run(checking) == 3
    assert "eos_token_id: expected" in capsys.readouterr().err
