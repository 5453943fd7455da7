"""Every family: the spec of a config agrees with transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from exporter.errors import BadInput, NotExpressible
from exporter.families import FAMILIES, describe
from exporter.families.spec import DecoderSpec, Role, Slot
from fixtures.models import families as tiny

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
#: The settings that a config of each model type must have; all others are defaults.
REQUIRED: dict[str, dict[str, Any]] = {name: SIZES for name in FAMILIES}
REQUIRED |= {"mixtral": SIZES | MOE, "qwen3_moe": SIZES | MOE, "gpt2": GPT2}
REQUIRED["gemma3"] = {"text_config": SIZES | {"num_key_value_heads": 2}}
REQUIRED["mistral3"] = {"text_config": SIZES | {"num_key_value_heads": 2, "model_type": "ministral3"}}
# For these model types transformers has a default of its own instead of the number of heads.
for _name in set(FAMILIES) - {"llama", "gpt2", "gpt_neox", "olmo2", "granite", "cohere", "phi3", "gemma3", "mistral3"}:
    REQUIRED[_name] = REQUIRED[_name] | {"num_key_value_heads": 2}


def config_of(model_type: str, **settings: Any) -> Any:
    return transformers.CONFIG_MAPPING[model_type](**settings)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_omitted_settings_have_the_defaults_of_transformers(model_type: str) -> None:
    required = REQUIRED[model_type]
    full = config_of(model_type, **required).to_dict()
    assert core(describe({"model_type": model_type, **required}, "gguf")) == core(describe(full, "gguf"))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_slots_and_tensors_of_a_model_are_one_to_one(name: str) -> None:
    prefix, settings, tied = tiny.FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(
        **settings, vocab_size=64, pad_token_id=0, tie_word_embeddings=tied
    )
    spec = describe(config.to_dict(), "gguf")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    # Experts are one tensor in the module and many on disk: the conformance tests count them.
    experts = {name for name, slot in spec.naming_schemes[0].items() if slot.role.value.startswith("mlp.experts")}
    state = {key for key in model.state_dict() if not key.startswith("model.layers.") or ".experts." not in key}
    names = {name for name, slot in spec.naming_schemes[0].items() if not slot.optional} - experts
    renamed = {"block_sparse_moe.gate.": "mlp.gate.", "embed_out.": "lm_head."}
    for stored, module in renamed.items():
        names = {name.replace(stored, module) for name in names}
    assert state == names
    assert bool(experts) == (spec.moe is not None)
    slots = spec.naming_schemes[0].values()
    assert len(set(slots)) == len(slots)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("gemma2", lambda spec: (spec.attention.windowed, spec.attention.softcap) == ({0, 2}, 2.0)),
        ("gemma3_text", lambda spec: spec.attention.windowed == {0, 1, 2, 3, 4, 6} and spec.rope.local_theta == 1e4),
        ("gemma", lambda spec: spec.norm.offset == 1 and spec.embed_scale == 8),
        ("smollm3", lambda spec: spec.rope.skipped == {3}),
        ("phi4_mini", lambda spec: (spec.rope.dims, spec.rope.original_positions) == (12, 256)),
        ("cohere", lambda spec: spec.rope.interleaved and spec.parallel and Role.MLP_NORM not in spec.roles),
        ("stablelm_12b", lambda spec: spec.attention.qk_norm == "each" and Role.MLP_NORM not in spec.roles),
        ("olmo2", lambda spec: spec.attention.qk_norm == "all" and Role.ATTN_NORM not in spec.roles),
        ("granite", lambda spec: (spec.logit_scale, spec.residual_scale, spec.attention.scale) == (0.5, 0.7, 0.1)),
        ("gpt2", lambda spec: spec.rope is None and Role.QKV in spec.transposed and not spec.mlp.gated),
        ("gpt_neox", lambda spec: spec.attention.qkv == "heads" and spec.parallel and spec.rope.dims == 4),
        ("mixtral", lambda spec: spec.moe.experts == 4 and spec.moe.normalised),
        ("seed_oss", lambda spec: Slot(Role.K, 1, "bias") in spec.naming_schemes[0].values()),
        ("arcee", lambda spec: (spec.mlp.activation, spec.mlp.gated) == ("relu2", False)),
        ("ernie4_5", lambda spec: spec.rope.interleaved),
        ("helium", lambda spec: spec.rope.interleaved and spec.rope.theta == 1e5),
        ("hunyuan", lambda spec: spec.attention.norm_after_rope and not spec.rope.stretched),
        ("hunyuan_alpha", lambda spec: spec.rope.stretched and spec.rope.theta == 1e4 * 1000 ** (32 / 30)),
        ("olmo3", lambda spec: (spec.attention.windowed, spec.rope.local_theta) == ({0, 1, 2}, 2e4)),
        (
            "olmo",
            lambda spec: (spec.norm.bare, spec.attention.clip) == (True, 0.8) and Role.FINAL_NORM not in spec.roles,
        ),
        ("nemotron", lambda spec: (spec.norm.offset, spec.rope.dims, spec.mlp.activation) == (1.0, 8, "relu2")),
        ("exaone4", lambda spec: (spec.attention.window, spec.rope.skipped) == (None, set())),
        ("glm4", lambda spec: spec.rope.interleaved and spec.rope.dims == 8 and Role.GATE_UP in spec.roles),
        ("cohere2", lambda spec: (spec.attention.windowed, spec.rope.skipped) == ({0, 1, 2}, {3})),
        ("ministral3", lambda spec: (spec.attention.log_growth, spec.rope.original_positions) == (0.2, 16)),
    ],
    ids=lambda value: value if isinstance(value, str) else "facts",
)
def test_a_spec_has_the_special_features_of_its_family(name: str, facts: Callable[[Any], bool]) -> None:
    prefix, settings, tied = tiny.FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**settings, tie_word_embeddings=tied)
    assert facts(describe(config.to_dict(), "gguf"))


def test_the_text_model_of_a_multimodal_gemma_has_both_naming_schemes() -> None:
    stored, today = describe({"model_type": "gemma3", **REQUIRED["gemma3"]}, "gguf").naming_schemes
    assert stored["language_model.model.layers.2.self_attn.q_norm.weight"] == Slot(Role.Q_NORM, 2, "weight")
    assert today["model.language_model.layers.2.self_attn.q_norm.weight"] == Slot(Role.Q_NORM, 2, "weight")
    assert stored["language_model.lm_head.weight"] == today["lm_head.weight"] == Slot(Role.HEAD, None, "weight")


def test_a_multimodal_model_is_not_an_onnx_decoder() -> None:
    with pytest.raises(
        NotExpressible, match=r"onnx: model_type 'gemma3' is not a built-in .* \(built-in: (?!.*gemma3,)"
    ):
        describe({"model_type": "gemma3", **REQUIRED["gemma3"]}, "onnx")


def test_gpt2_is_read_with_and_without_its_prefix() -> None:
    long, short = describe({"model_type": "gpt2", **GPT2}, "gguf").naming_schemes
    assert long["transformer.h.2.attn.c_attn.bias"] == short["h.2.attn.c_attn.bias"] == Slot(Role.QKV, 2, "bias")


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("mistral", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            "smollm3",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked_attention"] * 3},
            "'chunked_attention'",
        ),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "layers without experts"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "rope type 'linear'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "only the default attention scale"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ("mistral3", {"text_config": {"model_type": "mistral4"}}, "a text model of type 'mistral4'"),
        ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_type: expected yarn"),
        ("arcee", {"hidden_act": "silu"}, "hidden_act 'silu'"),
        ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "rope type 'linear'"),
        ("cohere", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ],
)
def test_variants_that_are_not_described_are_not_expressible(
    model_type: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotExpressible, match=message):
        describe({"model_type": model_type, **REQUIRED[model_type], **change}, "gguf")


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("mixtral", {"num_local_experts": None}, "num_local_experts: expected a positive"),
        ("mixtral", {"num_local_experts": 10**6}, "num_local_experts: expected at most 4096"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok: expected at most 4, found 9"),
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types: expected a list of 3 layer types",
        ),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window: expected true or false"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: expected a list of 3 zeros and ones"),
        ("gpt2", {"n_head": 5}, r"n_head: expected a divisor of n_embd \(32\), found 5"),
        ("gpt_neox", {"rotary_pct": 0.5, "num_attention_heads": 16}, "rotary dimensions: expected an even number"),
        ("stablelm", {"partial_rotary_factor": 2.0}, "rotary dimensions: expected an even number up to 8, found 16"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": 3}},
            "rope_parameters: expected an object for each layer type",
        ),
        ("olmo3", {"rope_parameters": [1]}, "rope_parameters: expected an object for each layer type"),
        ("mistral3", {"text_config": [1]}, "text_config: expected an object, found"),
        ("gemma3", {"text_config": None}, "text_config: expected an object, found None"),
        ("granite", {"logits_scaling": 0}, "logits_scaling: expected a number above 0"),
    ],
)
def test_a_broken_value_is_named(model_type: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        describe({"model_type": model_type, **REQUIRED[model_type], **change}, "gguf")


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
#: Configs as published before transformers 5: rope_theta beside rope_scaling, keys that moved since.
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("mistral", {"rope_theta": 1e6, "sliding_window": None, "max_position_embeddings": 32768}),
    ("mixtral", {"rope_theta": 1e6, "sliding_window": None}),
    ("qwen2", {"rope_theta": 1e6, "rope_scaling": YARN, "use_sliding_window": False, "sliding_window": 131072}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen3", {"rope_theta": 1e6, "head_dim": 16, "rope_scaling": None, "attention_bias": False}),
    ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_local_experts": None, "moe_intermediate_size": 24}),
    ("gemma", {"rope_theta": 20000.0, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    ("gemma2", {"rope_theta": 20000.0, "query_pre_attn_scalar": 224, "sliding_window": 32}),
    ("gemma3_text", {"rope_theta": 2e6, "rope_local_base_freq": 20000.0, "sliding_window": 32}),
    ("gemma3_text", {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("phi3", {"rope_theta": 20000.0, "rope_scaling": None, "sliding_window": 16}),
    (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", **FACTORS},
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 131072,
        },
    ),
    ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 20000}),
    ("olmo2", {"rope_theta": 5e5, "rms_norm_eps": 1e-6}),
    ("granite", {"rope_theta": 1e7, "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    ("starcoder2", {"rope_theta": 1e5, "sliding_window": 4096, "use_bias": True}),
    ("cohere", {"rope_theta": 8e6, "logit_scale": 0.0625, "use_qk_norm": True, "model_max_length": 131072}),
    ("stablelm", {"rope_theta": 20000, "partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    ("smollm3", {"rope_theta": 5e6, "no_rope_layers": [1, 1, 0]}),
    ("seed_oss", {"rope_theta": 1e7, "attention_bias": True, "attention_out_bias": False, "head_dim": 16}),
    ("mistral3", {"text_config": {**SIZES, "num_key_value_heads": 2, "model_type": "mistral", "head_dim": 16}}),
    ("arcee", {"rope_theta": 1e4, "rope_scaling": {**YARN, "factor": 20.0}, "head_dim": 16}),
    ("ernie4_5", {"rope_theta": 5e5, "use_bias": False, "head_dim": 16}),
    ("helium", {"rope_theta": 1e5, "attention_bias": True, "head_dim": 8}),
    ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}, "head_dim": 16}),
    ("olmo3", {"rope_theta": 5e5, "rope_scaling": YARN, "sliding_window": 16}),
    ("olmo3", {"rope_theta": 2e4}),
    ("exaone4", {"rope_theta": 1e6, "sliding_window": 16, "sliding_window_pattern": 2}),
    ("exaone4", {"rope_theta": 1e6, "sliding_window": None, "layer_types": ["full_attention"] * 3}),
    ("glm4", {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "head_dim": 16}),
    ("cohere2", {"rope_theta": 5e4, "rotary_pct": 1.0, "sliding_window_pattern": 2, "logit_scale": 0.25}),
    ("olmo", {"rope_theta": 1e4, "clip_qkv": 8.0}),
    ("nemotron", {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "norm_eps": 1e-6}),
    ("ministral3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}}),
]


@pytest.mark.parametrize(("model_type", "published"), PUBLISHED, ids=str)
def test_a_published_config_is_read_as_transformers_reads_it(model_type: str, published: dict[str, Any]) -> None:
    raw = REQUIRED[model_type] | published
    full = config_of(model_type, **{key: value for key, value in raw.items() if key != "num_local_experts" or value})
    assert core(describe({"model_type": model_type, **raw}, "gguf")) == core(describe(full.to_dict(), "gguf"))


def core(spec: DecoderSpec) -> DecoderSpec:
    """Without the keys that transformers adds to a rope scaling table."""
    if spec.rope is None or spec.rope.scaling is None:
        return spec
    names = ("rope_type", "factor", "short_factor", "mscale", "mscale_all_dim")
    kept = {key: value for key, value in spec.rope.scaling.items() if key in names}
    return replace(spec, rope=replace(spec.rope, scaling=kept))
