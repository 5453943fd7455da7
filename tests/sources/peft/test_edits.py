"""Tensors that were saved as shards are refused with the remedy, whatever the tensor is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from exporter.errors import TensorMismatch
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import WEIGHTS, Adapter
from exporter.tensors import Array
from fixtures.peft_adapters import IDS
from tests.sources.peft.written import Written, write

GATHER: Final = r"\(tensors that were sharded in training must be gathered before they are saved\)"
MATRICES: Final = (
    "embed_tokens.token_adapter.trainable_tokens_delta",
    "q_proj.lora_A.weight",
    "q_proj.lora_B.weight",
    "up_proj.lora_A.weight",
    "lm_head.weight",
    "layers.1.mlp.down_proj.weight",
    "embed_tokens.token_adapter.base_layer.weight",
)
VECTORS: Final = ("q_proj.lora_magnitude_vector", "model.norm.weight")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    config = LoraConfig(
        r=2,
        use_dora=True,
        target_modules=["q_proj", "up_proj"],
        trainable_token_indices={"embed_tokens": list(IDS)},
        modules_to_save=["lm_head", "model.norm", "down_proj"],
    )
    return write(tmp_path_factory.mktemp("shards"), config, embeddings=True)


def require_refused(written: Written, ending: str, shard: Array, folder: Path) -> None:
    stored = load_file(written.adapter / WEIGHTS)
    key = next(key for key in sorted(stored) if key.endswith(ending))
    folder.mkdir()
    for file in written.adapter.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(stored | {key: shard}, folder / WEIGHTS)
    with pytest.raises(TensorMismatch, match=GATHER) as caught:
        plan_merge(Checkpoint.open(written.base), [Adapter.open(folder)])
    assert caught.value.tensor == key


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("ending", [*MATRICES, *VECTORS])
def test_an_empty_tensor_is_a_shard(ending: str, shape: tuple[int, ...], written: Written, tmp_path: Path) -> None:
    require_refused(written, ending, np.zeros(shape, np.float32), tmp_path / "adapter")


@pytest.mark.parametrize("ending", MATRICES)
def test_a_flat_matrix_is_a_shard(ending: str, written: Written, tmp_path: Path) -> None:
    require_refused(written, ending, np.ones(24, np.float32), tmp_path / "adapter")


def test_the_whole_tensors_are_accepted(written: Written) -> None:
    assert plan_merge(Checkpoint.open(written.base), [Adapter.open(written.adapter)]).sources
