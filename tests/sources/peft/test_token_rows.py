"""Rows whose token ids are listed by module, also beside whole embeddings, are read and merged as stock PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from exporter.errors import UnreadableFile
from exporter.sources.peft.adapter import WEIGHTS, Adapter
from fixtures.peft_adapters import IDS, NEW_IDS, OTHER_IDS
from tests.sources.peft.written import require_merged_as_trained, write

OF_EMBEDDING = {"embed_tokens": list(IDS)}
OF_HEAD = {"lm_head": list(IDS)}
GROWN = [*IDS, *NEW_IDS]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **settings})


@pytest.mark.parametrize(
    ("layout", "ids", "embeddings", "grown"),
    [
        ("tied", OF_EMBEDDING, True, False),
        ("tied", {"model.embed_tokens": GROWN}, "auto", True),
        ("tied", {"d_tokens": list(IDS)}, "auto", False),
        ("untied", OF_EMBEDDING, "auto", False),
        ("untied", OF_HEAD, "auto", False),
        ("untied", OF_EMBEDDING, True, False),
        ("untied", OF_HEAD, True, False),
        ("untied", {"embed_tokens": GROWN}, "auto", True),
        ("untied", {"lm_head": GROWN}, "auto", True),
        ("untied", {"embed_tokens": GROWN, "lm_head": list(NEW_IDS)}, "auto", True),
    ],
)
def test_rows_by_module_are_merged_as_trained(
    layout: str, ids: dict[str, list[int]], embeddings: bool | str, grown: bool, tmp_path: Path
) -> None:
    written = write(tmp_path, lora(trainable_token_indices=ids), layout=layout, embeddings=embeddings, grown=grown)
    by_module = {edit.module: edit.token_ids for edit in Adapter.open(written.adapter).rows}
    for end, listed in ids.items():
        assert tuple(sorted(listed)) in {by_module[module] for module in by_module if module.endswith(end)}
    require_merged_as_trained(written, tmp_path / "out")


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("untied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ],
)
def test_lora_of_an_embedding_beside_its_base_layer_is_merged_as_trained(
    layout: str, settings: dict[str, Any], grown: bool, tmp_path: Path
) -> None:
    written = write(tmp_path, lora(**settings), layout=layout, grown=grown)
    stored = load_file(written.adapter / WEIGHTS)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in stored
    require_merged_as_trained(written, tmp_path / "out")


def test_a_tied_module_that_no_entry_names_has_the_ids_of_the_equal_rows(tmp_path: Path) -> None:
    written = write(tmp_path, lora(trainable_token_indices=OF_EMBEDDING), layout="tied", embeddings=True)
    weights = written.adapter / WEIGHTS
    stored = load_file(weights)
    head = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    assert {edit.token_ids for edit in Adapter.open(written.adapter).rows} == {tuple(sorted(IDS))}
    save_file(stored | {head: stored[head] + np.float32(1)}, weights)
    with pytest.raises(
        UnreadableFile, match="trainable_token_indices: expected token ids for lm_head, found token ids only for"
    ):
        Adapter.open(written.adapter)


def test_rows_of_two_modules_may_have_different_ids(tmp_path: Path) -> None:
    ids = {"embed_tokens": list(IDS), "lm_head": list(OTHER_IDS)}
    written = write(tmp_path, lora(trainable_token_indices=ids))
    rows = {edit.module: edit.token_ids for edit in Adapter.open(written.adapter).rows}
    assert rows == {"model.embed_tokens": tuple(sorted(IDS)), "lm_head": OTHER_IDS}
