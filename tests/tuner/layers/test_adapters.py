from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import trainable_tokens
from safetensors.torch import load_file, save_file
from torch import nn

import tuner
from tests.tuner.models import IDS, VOCAB, batch, build, embedding, logits_of, ours, perturb, rows_of, saved, theirs

STOCK = dict(PEFT_TYPE_TO_TUNER_MAPPING)
STOCK_LAYER = trainable_tokens.TrainableTokensLayer
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


# --- the model ---------------------------------------------------------------------------------------------------


def test_the_result_is_a_genuine_peft_model_on_our_classes() -> None:
    model = ours()
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert isinstance(model.base_model, tuner.TrainableTokensModel)
    assert isinstance(model.peft_config["default"], peft.TrainableTokensConfig)
    assert model.peft_config["default"].target_modules == "model.embed_tokens"
    assert model.get_nb_trainable_parameters()[0] == embedding(model).trainable_tokens_delta["default"].numel()


def test_peft_is_left_as_it_was_also_after_a_failure() -> None:
    ours()
    with pytest.raises(ValueError, match="found 67"):
        ours(token_indices=[VOCAB])
    assert STOCK == PEFT_TYPE_TO_TUNER_MAPPING
    assert trainable_tokens.TrainableTokensLayer is STOCK_LAYER
    assert type(theirs().base_model) is peft.TrainableTokensModel


def test_an_unknown_embedding_is_looked_for_under_its_usual_name() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(VOCAB, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.embed_tokens(x)
            return result

    model: Any = tuner.get_peft_model(Plain(), tuner.TrainableTokensConfig(token_indices=[1]))
    assert isinstance(model.base_model.model.embed_tokens, tuner.TrainableTokensLayer)


def test_a_tied_head_owns_no_parameters() -> None:
    model = ours()
    head = model.get_base_model().lm_head
    assert head.tied_adapter is embedding(model)
    assert len(rows_of(model)) == 1
    perturb(model)
    with torch.no_grad():
        hidden = torch.randn(1, 16)
        expected = hidden @ embedding(model).get_merged_weights(["default"]).T
    torch.testing.assert_close(head(hidden), expected, rtol=1e-5, atol=1e-6)  # float32, summed in another order


def test_an_untied_head_is_left_alone_unless_asked_for() -> None:
    assert isinstance(ours(tied=False).get_base_model().lm_head, nn.Linear)
    model = ours(tied=False, train_head=True)
    assert len(rows_of(model)) == 2
    assert model.get_base_model().lm_head.tied_adapter is None


def test_a_tied_base_ignores_train_head_and_both_targets_give_one_set_of_rows(tmp_path: Path) -> None:
    assert len(rows_of(ours(train_head=True))) == 1
    model = ours(target_modules=["embed_tokens", "lm_head"])
    assert len(rows_of(model)) == 1
    assert model.get_base_model().lm_head.tied_adapter is embedding(model)
    perturb(model)
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):  # stock PEFT, of any list of targets
        stock = peft.PeftModel.from_pretrained(build("llama"), saved(model, tmp_path))
    torch.testing.assert_close(logits_of(stock), logits_of(model), rtol=1e-5, atol=1e-5)  # float32, other order of sums


def test_rows_start_as_the_base_and_change_nothing() -> None:
    base = logits_of(build("llama"))
    torch.testing.assert_close(logits_of(ours()), base, rtol=1e-6, atol=1e-6)  # float32, k columns computed apart


def test_random_start_is_that_of_stock_peft() -> None:
    torch.manual_seed(5)
    mine = rows_of(ours(init_weights=False))
    torch.manual_seed(5)
    stock = rows_of(theirs(init_weights=False))
    assert all(torch.equal(mine[name], stock[name]) for name in stock)


@pytest.mark.parametrize("autocast", [True, False])
def test_rows_of_a_bfloat16_base_are_float32_unless_autocast_is_off(autocast: bool) -> None:
    config = tuner.TrainableTokensConfig(token_indices=IDS)
    model = tuner.get_peft_model(build("llama").to(torch.bfloat16), config, autocast_adapter_dtype=autocast)
    (rows,) = rows_of(model).values()
    assert rows.dtype == (torch.float32 if autocast else torch.bfloat16)
    assert logits_of(model).dtype == torch.bfloat16


# --- files -------------------------------------------------------------------------------------------------------


@TIED
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_our_files_are_those_of_stock_peft(architecture: str, tied: bool, tmp_path: Path) -> None:
    mine, stock = ours(architecture, tied=tied), theirs(architecture, tied=tied)
    perturb(mine)
    perturb(stock)
    a, b = saved(mine, tmp_path / "a"), saved(stock, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_our_own_option_stays_out_of_the_file(tmp_path: Path) -> None:
    config = json.loads((saved(ours(tied=False, train_head=True), tmp_path) / "adapter_config.json").read_text())
    assert "train_head" not in config
    assert config["target_modules"] == ["model.embed_tokens", "lm_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(("tied", "train_head"), [(True, False), (False, False), (False, True)])
def test_adapters_go_to_stock_peft_and_back_bit_for_bit(tied: bool, train_head: bool, tmp_path: Path) -> None:
    mine = ours(tied=tied, train_head=train_head)
    perturb(mine)
    stock = peft.PeftModel.from_pretrained(build("llama", tied=tied), saved(mine, tmp_path / "a"))
    back = tuner.load_peft_model(build("llama", tied=tied), saved(stock, tmp_path / "b"))
    assert type(stock.base_model) is peft.TrainableTokensModel
    assert isinstance(back.base_model, tuner.TrainableTokensModel)
    for other in (stock, back):
        assert all(torch.equal(value, rows_of(other)[name]) for name, value in rows_of(mine).items())
    torch.testing.assert_close(logits_of(stock), logits_of(mine), rtol=1e-5, atol=1e-5)  # float32, other order of sums
    assert torch.equal(logits_of(back), logits_of(mine))


@pytest.mark.parametrize("low_memory", [False, True])
def test_older_files_with_one_key_for_a_tied_model_load_without_a_warning(low_memory: bool, tmp_path: Path) -> None:
    model = ours()
    perturb(model)
    saved(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.lm_head.trainable_tokens_delta"]
    save_file(tensors, path, metadata={"format": "pt"})
    loaded = tuner.load_peft_model(build("llama"), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_low_memory_loading_gives_the_same_model(tmp_path: Path) -> None:
    model = ours()
    perturb(model)
    loaded = tuner.load_peft_model(build("llama"), saved(model, tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert len(rows_of(loaded)) == 1


@TIED
def test_rows_beside_a_lora_adapter_train_and_merge_as_in_stock_peft(tied: bool) -> None:
    def trained() -> tuple[Any, list[float], dict[str, Any]]:
        torch.manual_seed(0)
        options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": IDS}
        model = peft.get_peft_model(build("llama", tied=tied), peft.LoraConfig(**options))
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(5):
            loss = model(input_ids=batch(step), labels=batch(step)).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        return embedding(model).token_adapter, losses, model.merge_and_unload().state_dict()

    with tuner.enable():
        layer, our_losses, ours_merged = trained()
    assert isinstance(layer, tuner.TrainableTokensLayer)
    _, their_losses, theirs_merged = trained()
    assert our_losses == pytest.approx(their_losses, abs=1e-6)  # float32, other order of sums
    for name, value in theirs_merged.items():
        torch.testing.assert_close(ours_merged[name], value, rtol=0, atol=1e-6)
