from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporter.errors import BadInput
from tuner.inputs.vocab import add_tokens, encode, existing_token_id, start_rows


@pytest.fixture
def tied(base: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), AutoTokenizer.from_pretrained(base)


@pytest.fixture
def padded(untied_base: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(untied_base), AutoTokenizer.from_pretrained(untied_base)


def test_padding_rows_are_used_before_the_matrix_grows(padded: tuple[Any, Any]) -> None:
    model, tokenizer = padded
    assert add_tokens(model, tokenizer, ["<ship>", "<lamp>"]) == [320, 321]
    assert len(model.get_input_embeddings().weight) == 322
    assert add_tokens(model, tokenizer, ["<fog>"]) == [322]
    assert len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == model.config.vocab_size == 323


def test_growing_keeps_the_tie_and_every_other_row(tied: tuple[Any, Any]) -> None:
    model, tokenizer = tied
    before = model.get_input_embeddings().weight.detach().clone()
    assert add_tokens(model, tokenizer, ["<ship>"], pad_to_multiple_of=8) == [320]
    weight = model.get_input_embeddings().weight
    assert len(weight) == 328
    assert weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert torch.equal(weight[:320], before)


def test_a_new_token_starts_as_the_mean_of_its_sub_tokens_in_both_matrices(padded: tuple[Any, Any]) -> None:
    model, tokenizer = padded
    subtokens = encode(tokenizer, "<ship>")
    assert len(subtokens) > 1
    (token_id,) = add_tokens(model, tokenizer, ["<ship>"])
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        torch.testing.assert_close(weight[token_id], weight[subtokens].mean(0))
    assert encode(tokenizer, "a<ship>b")[1] == token_id


def test_a_description_replaces_the_sub_tokens(tied: tuple[Any, Any]) -> None:
    model, tokenizer = tied
    ids = encode(tokenizer, "the keeper")
    (token_id,) = add_tokens(model, tokenizer, ["<ship>"], init="zeros", descriptions={"<ship>": "the keeper"})
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(weight[token_id], weight[ids].mean(0))


def test_starts_from_all_rows() -> None:
    matrix = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    mean, zeros, empty = start_rows(matrix, [[1], [1], []], ["mean", "zeros", "subtokens"], seed=0)
    torch.testing.assert_close(mean, matrix.mean(0))
    assert torch.equal(zeros, torch.zeros(6))
    assert torch.equal(empty, mean)


def test_samples_have_the_rows_mean_and_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(500, 4, generator=generator) @ torch.tensor(
        [[2.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]
    )
    drawn = start_rows(matrix, [[]] * 4000, ["sample"] * 4000, seed=1)
    # 4000 draws: the standard error of these statistics is about 5 %.
    torch.testing.assert_close(drawn.mean(0), matrix.mean(0), rtol=0, atol=0.2)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(matrix.T), rtol=0.2, atol=0.3)
    assert torch.equal(drawn, start_rows(matrix, [[]] * 4000, ["sample"] * 4000, seed=1))


def test_special_tokens_are_left_out_of_clean_text_and_others_are_not(tied: tuple[Any, Any]) -> None:
    model, tokenizer = tied
    add_tokens(model, tokenizer, ["<ctl>"], special=True)
    add_tokens(model, tokenizer, ["<word>"])
    assert tokenizer.decode(encode(tokenizer, "a<ctl>b<word>"), skip_special_tokens=True) == "ab<word>"


def test_a_known_token_is_found_by_its_entry_or_by_its_text(tied: tuple[Any, Any]) -> None:
    _, tokenizer = tied
    assert existing_token_id(tokenizer, "Ġthe", 320) == existing_token_id(tokenizer, " the", 320)
    assert existing_token_id(tokenizer, "<|im_end|>", 320) == 2


@pytest.mark.parametrize(
    ("token", "rows", "message"),
    [
        ("", 320, "empty text"),
        ("lighthouse keeper", 320, "expected a text that encodes to one token, found"),
        ("<|im_end|>", 2, "expected an id below 2, .* found 2"),
    ],
)
def test_tokens_that_cannot_be_trained_again(token: str, rows: int, message: str, tied: tuple[Any, Any]) -> None:
    with pytest.raises(BadInput, match=message):
        existing_token_id(tied[1], token, rows)


def test_a_token_the_tokenizer_does_not_know(tied: tuple[Any, Any]) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")), unk_token="<unk>"
    )
    with pytest.raises(BadInput, match="a text that encodes to a token of the vocabulary, found the unknown token"):
        existing_token_id(tokenizer, "zebra", 2)


@pytest.mark.parametrize(
    ("tokens", "descriptions", "message"),
    [
        (["<|im_end|>"], {}, r"expected a new token, found an existing token \(id 2\)"),
        (["<a>", "<a>"], {}, "expected distinct tokens, found the same token twice"),
        ([""], {}, "empty text"),
        (["<a>"], {"<b>": "x"}, "a token that is also given with --new-token"),
    ],
)
def test_tokens_that_cannot_be_added(
    tokens: list[str], descriptions: dict[str, str], message: str, tied: tuple[Any, Any]
) -> None:
    model, tokenizer = tied
    with pytest.raises(BadInput, match=message):
        add_tokens(model, tokenizer, tokens, descriptions=descriptions)
    assert len(tokenizer) == 320
