"""A conversion that no class has today: one matrix is stored as two tensors that hold the columns of the matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from exporter.cli.main import run
from fixtures.zoo.adapters import write
from fixtures.zoo.build import load
from tests.session.zoo import ZooCheckpoint
from tests.support.damaged_data import DamageData

HALVES = ("mlp.left_down.weight", "mlp.right_down.weight")
WHOLE = "mlp.down_proj.weight"


def add_conversion(content: Any) -> None:
    operation = {"dim": 1, "name": "Concatenate", "num_shards_attribute": None}
    added = {"name": "WeightConverter", "operations": [operation], "sources": list(HALVES), "targets": [WHOLE]}
    content["conversions"]["hrm_text"].append(added)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_update_of_columns_is_merged_unless_it_needs_whole_rows(
    dora: bool,
    zoo_checkpoint: ZooCheckpoint,
    damage: DamageData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sound, base, out = zoo_checkpoint("hrm_text"), tmp_path / "base", tmp_path / "out"
    config = LoraConfig(r=2, target_modules=["down_proj"], use_dora=dora)
    adapter = write(load(sound), config, tmp_path / "adapter")
    base.mkdir()
    (base / "config.json").write_bytes((sound / "config.json").read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(sound / "model.safetensors").items():
        halves = dict(zip((name.replace(WHOLE, half) for half in HALVES), value.chunk(2, -1), strict=True))
        tensors |= {half: part.contiguous() for half, part in halves.items()} if WHOLE in name else {name: value}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    damage("conversions.json", add_conversion)
    code = run(["merge", str(adapter), "--base", str(base), "-o", str(out), "-q", "--verify", "weights"])
    if dora:
        assert code == 5
        assert "DoRA needs the norms of whole rows" in capsys.readouterr().err
        assert not out.exists()
        return
    assert code == 0
    tuned: Any = PeftModel.from_pretrained(load(sound), adapter)
    wanted, given = tuned.merge_and_unload().state_dict(), load_file(out / "model.safetensors")
    for name, value in wanted.items():
        if name.endswith(WHOLE):
            merged = torch.cat([given[name.replace(WHOLE, half)] for half in HALVES], 1)
            assert torch.allclose(merged, value, rtol=0, atol=1e-5 * float(value.abs().max()))
