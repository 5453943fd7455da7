"""Several adapters in one model, switched, deleted and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tuner
from tests.tuner.models import IDS, batch, build, embedding, logits_of, ours, perturb, rows_of, theirs

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def two_adapters(*, overlap: bool = False) -> Any:
    model = ours()
    ids = [IDS[0], 9] if overlap else [9, 2]
    model.add_adapter("other", tuner.TrainableTokensConfig(token_indices=ids, task_type="CAUSAL_LM"))
    perturb(model)
    perturb(model, "other", seed=1)
    return model


def test_a_second_adapter_changes_nothing_until_it_is_set() -> None:
    model = two_adapters()
    alone = ours()
    perturb(alone)
    assert torch.equal(logits_of(model), logits_of(alone))
    model.set_adapter("other")
    other = ours(token_indices=[9, 2])
    perturb(other, seed=1)
    assert torch.equal(logits_of(model), logits_of(other))


def test_two_adapters_with_disjoint_tokens_work_at_once() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    merged = two_adapters()
    merged.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits_of(model), logits_of(merged.merge_and_unload()), rtol=1e-5, atol=1e-5)


def test_two_adapters_with_one_token_in_common_are_refused() -> None:
    model = two_adapters(overlap=True)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="both have a row for token id 3"):
        logits_of(model)
    before = embedding(model).weight.clone()
    with pytest.raises(ValueError, match="both have a row for token id 3"):
        model.merge_adapter()
    assert torch.equal(embedding(model).weight, before)


def test_only_the_active_adapter_is_trained() -> None:
    model = two_adapters()
    model.set_adapter("other")
    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    rows = embedding(model).trainable_tokens_delta
    assert rows["default"].grad is None
    assert rows["other"].grad is not None


def test_a_deleted_adapter_is_gone_from_embedding_and_head() -> None:
    model = two_adapters()
    model.delete_adapter("other")
    assert list(embedding(model).trainable_tokens_delta) == ["default"]
    assert list(model.get_base_model().lm_head.token_indices) == ["default"]
    alone = ours()
    perturb(alone)
    assert torch.equal(logits_of(model), logits_of(alone))


def test_disabled_adapters_are_the_base_bit_for_bit() -> None:
    model, base = ours(), build("llama")
    perturb(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(base))
    assert not torch.equal(logits_of(model), logits_of(base))


def test_a_copied_model_is_independent() -> None:
    model = ours()
    copied = copy.deepcopy(model)
    before = logits_of(model)
    perturb(copied)
    assert torch.equal(logits_of(model), before)
    assert not torch.equal(logits_of(copied), before)
    assert len(rows_of(copied)) == 1


# --- merging -----------------------------------------------------------------------------------------------------


@TIED
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_merged_weights_equal_those_of_stock_peft(architecture: str, tied: bool) -> None:
    mine, stock = ours(architecture, tied=tied), theirs(architecture, tied=tied)
    perturb(mine)
    perturb(stock)
    a, b = mine.merge_and_unload().state_dict(), stock.merge_and_unload().state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_merging_keeps_the_tie_and_unmerging_restores_every_bit() -> None:
    model, base = ours(), build("llama")
    perturb(model)
    unmerged = logits_of(model)
    model.merge_adapter(safe_merge=True)
    head = model.get_base_model().lm_head
    assert head.weight.data_ptr() == embedding(model).weight.data_ptr()
    torch.testing.assert_close(logits_of(model), unmerged, rtol=1e-5, atol=1e-5)  # float32, other order of sums
    model.unmerge_adapter()
    assert torch.equal(embedding(model).weight, base.get_input_embeddings().weight)
    assert torch.equal(logits_of(model), unmerged)


def test_disabling_a_merged_adapter_gives_the_base() -> None:
    model, base = ours(), build("llama")
    perturb(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(base))


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_safe_merge_refuses_rows_that_are_not_finite_and_writes_nothing(value: float) -> None:
    config = tuner.TrainableTokensConfig(token_indices=IDS)
    model = tuner.get_peft_model(build("llama").to(torch.float16), config)
    with torch.no_grad():
        embedding(model).trainable_tokens_delta["default"][1, 2] = value  # 1e30 is infinite in float16
    before = embedding(model).weight.clone()
    with pytest.raises(ValueError, match="expected finite token rows, found NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(embedding(model).weight, before)
    assert not embedding(model).merged


def test_unmerging_twice_warns() -> None:
    with pytest.warns(UserWarning, match="No adapter is merged"):
        embedding(ours()).unmerge()


def test_a_loaded_adapter_merges_into_a_model_that_saves(tmp_path: Path) -> None:
    model = ours()
    perturb(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(merged))
