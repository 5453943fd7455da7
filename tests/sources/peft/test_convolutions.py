"""Factors of convolutions are read as matrices, and factors of a convolution with groups are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exporter.errors import NotExpressible, TensorMismatch
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import LowRank


def adapter(folder: Path, down: tuple[int, ...], up: tuple[int, ...]) -> Adapter:
    module = "base_model.model.visual.proj"
    factors = {f"{module}.lora_A.weight": torch.ones(down), f"{module}.lora_B.weight": torch.ones(up)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return Adapter.open(folder)


@pytest.mark.parametrize("kernel", [(5,), (2, 3), (2, 3, 4)], ids=str)
def test_a_convolution_has_one_column_for_each_channel_and_place_of_the_kernel(
    kernel: tuple[int, ...], tmp_path: Path
) -> None:
    (edit,) = adapter(tmp_path, (4, 3, *kernel), (8, 4, *[1 for _ in kernel])).edits
    assert isinstance(edit, LowRank)
    assert edit.target_type == "convolution"
    assert edit.down.spec.shape == (4, 3 * torch.ones(kernel).numel())
    assert edit.up.spec.shape == (8, 4)


def test_a_convolution_with_groups_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotExpressible, match="grouped convolution"):
        adapter(tmp_path, (4, 3, 2, 2), (8, 2, 1, 1))


def test_an_update_with_a_kernel_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorMismatch, match="lora_B of shape"):
        adapter(tmp_path, (4, 3, 2, 2), (8, 4, 2, 2))
