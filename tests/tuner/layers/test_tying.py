from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from tests.tuner.models import VOCAB, build
from tuner.layers.tying import tie_flag, tied_module_names


def test_shared_storage_is_a_tie_whatever_the_config_says() -> None:
    model = build("llama", tied=True)
    model.config.tie_word_embeddings = False
    assert tied_module_names(model) == ["lm_head"]


def test_shared_storage_in_two_parameters_is_a_tie() -> None:
    model = build("llama", tied=False)
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.data)
    assert tied_module_names(model) == ["lm_head"]


def test_two_different_matrices_are_not_tied_whatever_the_config_says() -> None:
    model = build("llama", tied=False)
    model.config.tie_word_embeddings = True
    assert tied_module_names(model) == []


def test_a_duplicate_head_is_a_tie_if_the_config_says_so() -> None:
    model = build("llama", tied=True)
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    assert tied_module_names(model) == ["lm_head"]
    model.config.tie_word_embeddings = False
    assert tied_module_names(model) == []


def test_without_storage_the_declaration_decides() -> None:
    with torch.device("meta"):
        model = build("llama", tied=True)
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    assert tied_module_names(model) == ["lm_head"]
    model.config.tie_word_embeddings = False
    assert tied_module_names(model) == []


def test_the_flag_of_a_nested_text_config_counts() -> None:
    class Text:
        tie_word_embeddings = True

    class Outer:
        def get_text_config(self) -> Text:
            return Text()

    assert tie_flag(Outer())
    assert not tie_flag(None)


def test_every_user_of_a_shared_matrix_is_found() -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    sizes |= {"tie_word_embeddings": True, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    assert set(tied_module_names(model)) == {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}


def test_a_model_without_embeddings_has_no_ties() -> None:
    assert tied_module_names(nn.Linear(2, 2)) == []
