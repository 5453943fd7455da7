"""Mutated adapter configs give a plan or an error of exporter.errors, never another exception."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from safetensors.numpy import save_file

from exporter.errors import BadInput, NotExpressible, TensorMismatch, UnreadableFile
from exporter.merge.plan import MergePlan, plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import WEIGHTS, Adapter
from exporter.sources.peft.folders import CONFIG
from exporter.tensors import Array
from fixtures.hostile import rawtensors
from tests.sources.folders import EMBED, PREFIX, adapter, checkpoint, matrix
from tests.sources.mutations import mutated

LINEAR = "model.layers.0.mlp.up_proj"
ROWS_CONFIG = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 1], "base_model_name_or_path": None}
LORA_CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {"up_proj": 2},
    "alpha_pattern": {"q_proj": 8},
    "target_modules": ["up_proj"],
    "trainable_token_indices": {"embed_tokens": [5, 1]},
    "modules_to_save": None,
    "init_lora_weights": True,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tensors = {EMBED: matrix(), f"{LINEAR}.weight": matrix(8, 4)}
    return Checkpoint.open(checkpoint(tmp_path_factory.mktemp("mutations") / "base", tensors, vocab_size=6))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(tmp_path_factory.mktemp("mutations") / "rows", [5, 1], {"model.embed_tokens": matrix(2)})


def lora(folder: Path, down: Array, up: Array, **more: Array) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(LORA_CONFIG))
    named = {"lora_A.weight": down, "lora_B.weight": up, **more}
    factors = {f"{PREFIX}{LINEAR}.{name}": value for name, value in named.items()}
    save_file(
        {**factors, f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": matrix(2)}, folder / WEIGHTS
    )
    return folder


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora(tmp_path_factory.mktemp("mutations") / "lora", matrix(2, 4), matrix(8, 2))


def plan(base: Checkpoint, folder: Path) -> MergePlan:
    return plan_merge(base, [Adapter.open(folder)])


def plan_or_refuse(base: Checkpoint, folder: Path, config: bytes) -> None:
    (folder / CONFIG).write_bytes(config)
    with suppress(BadInput, NotExpressible):
        plan(base, folder)


many = settings(
    max_examples=1_000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@many
@given(config=mutated(json.dumps(ROWS_CONFIG).encode()))
def test_a_mutated_config_of_rows_is_merged_or_refused(base: Checkpoint, rows: Path, config: bytes) -> None:
    plan_or_refuse(base, rows, config)


@many
@given(config=mutated(json.dumps(LORA_CONFIG).encode()))
def test_a_mutated_config_of_updates_is_merged_or_refused(base: Checkpoint, updates: Path, config: bytes) -> None:
    plan_or_refuse(base, updates, config)


def test_the_sound_adapters_behind_the_mutations_are_merged(base: Checkpoint, tmp_path: Path) -> None:
    sources = plan(base, lora(tmp_path / "lora", matrix(2, 4), matrix(8, 2))).sources
    assert sources[f"{LINEAR}.weight"][1].updates
    assert sources["model.embed_tokens.weight"][1].rows


def test_a_rank_that_is_not_a_whole_number_is_refused(base: Checkpoint, updates: Path) -> None:
    for config in (LORA_CONFIG | {"r": 0.5}, LORA_CONFIG | {"rank_pattern": {"up_proj": 1.5}}):
        (updates / CONFIG).write_text(json.dumps(config))
        with pytest.raises(UnreadableFile, match=r"expected a whole number|expected integers"):
            plan(base, updates)


@pytest.mark.parametrize("name", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_factor_that_is_not_finite_is_refused_before_anything_is_written(
    name: str, value: float, base: Checkpoint, tmp_path: Path
) -> None:
    factors = {"lora_A.weight": matrix(2, 4), "lora_B.weight": matrix(8, 2)}
    factors |= {"lora_magnitude_vector": matrix(8, 1).reshape(8)} if "magnitude" in name else {}
    factors[name].reshape(-1)[-1] = value
    down, up = factors.pop("lora_A.weight"), factors.pop("lora_B.weight")
    with pytest.raises(TensorMismatch, match="expected finite values, found NaN or Inf in row") as caught:
        plan(base, lora(tmp_path / "lora", down, up, **factors))
    assert caught.value.tensor == f"{PREFIX}{LINEAR}.{name}"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1 << 17, 1 << 20), (1 << 20, 1 << 17)), "expected a rank of at most 65536"),
        (((2, 1 << 30), (8, 2)), "the adapter was trained on a different base"),
        (((2, 4), (1 << 30, 2)), "the adapter was trained on a different base"),
    ],
)
def test_factors_that_do_not_fit_are_refused_without_reading_them(
    shapes: tuple[tuple[int, int], tuple[int, int]], message: str, base: Checkpoint, tmp_path: Path
) -> None:
    """The file is sparse: reading half a terabyte of nothing would take minutes."""
    folder = lora(tmp_path / "lora", matrix(2, 4), matrix(8, 2))
    header, end = {}, 0
    for name, shape in zip(("lora_A.weight", "lora_B.weight"), shapes, strict=True):
        begin, end = end, end + 4 * shape[0] * shape[1]
        entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        header[f"{PREFIX}{LINEAR}.{name}"] = entry
    rawtensors.write(folder / WEIGHTS, header, b"")
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + end)
    with pytest.raises(TensorMismatch, match=message):
        plan(base, folder)
