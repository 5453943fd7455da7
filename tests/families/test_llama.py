from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from exporter.errors import BadInput, NotExpressible
from exporter.families import FAMILIES, describe
from exporter.families.spec import Role, Slot
from exporter.sources.hf.checkpoint import Checkpoint

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_a_spec_has_the_values_of_transformers_config(tiny_tied: Path) -> None:
    spec, want = describe(Checkpoint.open(tiny_tied).config, "gguf"), AutoConfig.from_pretrained(tiny_tied)
    assert (spec.vocab, spec.hidden, spec.layers) == (want.vocab_size, want.hidden_size, want.num_hidden_layers)
    assert (spec.attention.heads, spec.attention.kv_heads) == (want.num_attention_heads, want.num_key_value_heads)
    assert (spec.attention.head_dim, spec.mlp.inner) == (want.head_dim, want.intermediate_size)
    assert (spec.norm.eps, spec.max_positions) == (want.rms_norm_eps, want.max_position_embeddings)
    assert spec.rope is not None
    assert spec.rope.theta == want.rope_parameters["rope_theta"]
    assert spec.attention.scale == LlamaForCausalLM(want).model.layers[0].self_attn.scaling


@pytest.mark.parametrize("biases", [False, True])
def test_every_tensor_of_a_model_has_a_slot(biases: bool) -> None:
    config = LlamaConfig(
        **{key: value for key, value in SMALL.items() if key != "model_type"},
        attention_bias=biases,
        mlp_bias=biases,
        tie_word_embeddings=False,
    )
    slots = describe(config.to_dict(), "onnx").naming_schemes[0]
    state = LlamaForCausalLM(config).state_dict()
    assert state.keys() <= slots.keys()
    assert state.keys() == {name for name, slot in slots.items() if biases or slot.parameter == "weight"}
    assert slots["model.layers.1.self_attn.o_proj.weight"] == Slot(Role.ATTN_OUT, 1, "weight")


def test_no_two_tensors_share_a_slot() -> None:
    slots = describe(SMALL, "onnx").naming_schemes[0]
    assert len(set(slots.values())) == len(slots)


def test_omitted_settings_have_the_defaults_of_transformers() -> None:
    spec, want = describe(SMALL, "gguf"), LlamaConfig(**{k: v for k, v in SMALL.items() if k != "model_type"})
    assert spec.attention.kv_heads == want.num_key_value_heads
    assert spec.attention.head_dim == want.head_dim
    assert spec.norm.eps == want.rms_norm_eps
    assert spec.max_positions == want.max_position_embeddings
    assert want.rope_parameters is not None
    assert spec.rope is not None
    assert spec.rope.theta == want.rope_parameters["rope_theta"]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 5e5, {**LLAMA3, "rope_theta": 5e5}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            1e4,
            {"type": "linear", "rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def test_both_spellings_of_rope_are_read(config: dict[str, Any], theta: float, scaling: object) -> None:
    rope = describe(SMALL | config, "gguf").rope
    assert rope is not None
    assert (rope.dims, rope.theta) == (4, theta)
    assert rope.scaling == scaling


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type"),
        ({"rope_parameters": {"rope_type": "linear", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not a built-in model .*ttexport converter install .*ttexport patch",
        ),
        ({"model_type": None}, "model_type None is not a built-in model family"),
        ({"model_type": ["llama"]}, "is not a built-in model family"),
    ],
)
def test_variants_that_are_not_described_are_not_expressible(change: dict[str, Any], message: str) -> None:
    with pytest.raises(NotExpressible, match=message):
        describe(SMALL | change, "gguf")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, True, "16", [16], 1 << 31, 10**400])
def test_a_size_must_be_a_positive_integer(key: str, value: object) -> None:
    with pytest.raises(BadInput, match=rf"config\.json: {key}: expected a positive") as caught:
        describe(SMALL | {key: value}, "gguf")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta: expected a number above 0"),
        ({"rope_theta": 10**400}, "rope_theta: expected a number above 0"),
        ({"rope_theta": None}, "rope_theta: expected a number above 0"),
        ({"rope_scaling": "llama3"}, "rope_parameters: expected an object, found 'llama3'"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads: expected a divisor of num_attention_heads \(4\), found 3"),
        ({"num_attention_heads": 32}, "head_dim: expected a positive"),
        ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers: expected at most 10000"),
    ],
)
def test_a_broken_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        describe(SMALL | change, "gguf")


def test_every_row_of_the_table_is_its_model_type() -> None:
    assert all(family.model_type == key for key, family in FAMILIES.items())
