"""An adapter that changes nothing is reported; an adapter that changes anything is not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from exporter.cli.main import run
from exporter.sources.peft.adapter import WEIGHTS, Adapter
from fixtures.models.tie_layouts import build
from tests.merge.tuned import reloaded

MESSAGE = "the adapter does not change the base, because a factor of every update is zero"


def untrained(folder: Path, **settings: Any) -> Path:
    """An adapter as PEFT initialises it."""
    build(folder / "base", "llama", "untied")
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(reloaded(folder / "base"), config).save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def changed(adapter: Path, ending: str) -> None:
    """Set the last number of the last tensor whose key has the ``ending``."""
    stored = load_file(adapter / WEIGHTS)
    key = sorted(key for key in stored if key.endswith(ending))[-1]
    stored[key].reshape(-1)[-1] += np.float32(0.5)
    save_file(stored, adapter / WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "ending"),
    [
        ({}, "v_proj.lora_B.weight"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding_A"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "lora_B.weight"),
    ],
)
def test_an_untrained_adapter_is_reported(settings: dict[str, Any], ending: str, tmp_path: Path) -> None:
    adapter = untrained(tmp_path, **settings)
    stored = load_file(adapter / WEIGHTS)
    save_file({key: value for key, value in stored.items() if "base_layer" not in key}, adapter / WEIGHTS)
    assert Adapter.open(adapter).notes == [f"{adapter / WEIGHTS}: {MESSAGE}"]
    changed(adapter, ending)
    assert Adapter.open(adapter).notes == []


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"trainable_token_indices": [1, 2]},
        {"modules_to_save": ["norm"]},
        {"init_lora_weights": False},
        {"lora_bias": True, "init_lora_weights": False},
    ],
)
def test_an_adapter_with_other_changes_is_not_reported(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert Adapter.open(untrained(tmp_path, **settings)).notes == []


def test_the_note_is_a_line_of_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = untrained(tmp_path)
    assert run(["merge", str(adapter), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out")]) == 0
    assert f"note: {adapter / WEIGHTS}: {MESSAGE}" in capsys.readouterr().err.splitlines()
