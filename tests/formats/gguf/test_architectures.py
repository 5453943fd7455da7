"""A config that contradicts values hard-coded in llama.cpp is refused before a byte is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import NotExpressible, TensorMismatch
from exporter.families import FAMILIES, describe
from exporter.families.spec import DecoderSpec
from exporter.formats.gguf import plan_gguf
from exporter.formats.gguf.architectures import architecture, notes
from exporter.formats.gguf.metadata import decoder_keys
from fixtures.models.families import build
from tests.formats.gguf.conftest import merged

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
#: Model types whose sliding window llama.cpp reads and applies, and all model types with a sliding window.
READ = {"gemma2", "gemma3_text", "olmo3", "exaone4", "cohere2"}
WINDOWED = READ | {"mistral", "mixtral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "starcoder2", "smollm3", "phi3"}
GROWING = {"type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}
GEMMA = {"query_pre_attn_scalar": 8, "head_dim": 8}


def spec_of(model_type: str, **settings: Any) -> DecoderSpec:
    extra: dict[str, Any] = MOE if model_type in ("mixtral", "qwen3_moe") else {}
    extra |= {"sliding_window": None} if model_type == "exaone4" else {}
    extra |= GEMMA if model_type.startswith("gemma") else {}
    return describe({"model_type": model_type, **SIZES, **extra, **settings}, "gguf")


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gemma2", {"query_pre_attn_scalar": 9}, "attention scale: expected 0.353553, which llama.cpp hard-codes"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, r"sliding-window layers: expected \[0, 2\], which"),
        ("gemma3_text", {"sliding_window_pattern": 2}, r"sliding-window layers: expected \[0, 1, 2, 3\], which"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "llama.cpp does not support attn_logit_softcapping"),
        ("gemma", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "llama.cpp does not support rope type 'linear'"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, r"layers without rotary embedding: expected \[3\], which"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob: expected true, because llama.cpp always normalises"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm: expected false, which llama.cpp assumes"),
        ("granite", {"head_dim": 16}, "head_dim: llama.cpp computes 8 for this architecture, but this model has 16"),
        ("qwen2", {"head_dim": 16}, r"head_dim: .* equals the hidden size \(32\), found 4 \* 16"),
        ("qwen2", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "llama.cpp does not support rope type 'llama3'"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.2}},
            "YaRN parameter attention_factor",
        ),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "YaRN parameter truncate"),
        ("llama", {"rope_scaling": {"type": "yarn", "mscale": 0.7, "mscale_all_dim": 1}}, "YaRN parameter mscale"),
        ("cohere2", {"sliding_window_pattern": 2}, r"sliding-window layers: expected \[0, 1, 2\], which llama.cpp"),
        ("exaone4", {"sliding_window": 8}, "sliding_window: expected null, which llama.cpp assumes .* found 8"),
        (
            "exaone4",
            {"num_hidden_layers": 64, "layer_types": ["full_attention"] * 64},
            "sliding_window: expected a number, .* with 64 layers",
        ),
        ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "rope_theta of sliding-window"),
        ("ministral3", {"rope_scaling": {**GROWING, "mscale": 0.7, "mscale_all_dim": 1}}, "YaRN parameter mscale"),
    ],
)
def test_a_config_that_llama_cpp_cannot_represent_is_refused(
    model_type: str, settings: dict[str, Any], reason: str
) -> None:
    row = FAMILIES[model_type].llama_cpp
    assert architecture(spec_of(model_type), tied=row.head != "must") is row
    with pytest.raises(NotExpressible, match=f"gguf: {row.name}: {reason}"):
        architecture(spec_of(model_type, **settings), tied=True)


def test_the_27b_models_have_another_scale() -> None:
    large = {"num_hidden_layers": 46, "num_attention_heads": 8, "head_dim": 8, "query_pre_attn_scalar": 4}
    assert architecture(spec_of("gemma2", **large), tied=True).name == "gemma2"
    with pytest.raises(NotExpressible, match=r"attention scale: expected 0.5, which llama.cpp hard-codes"):
        architecture(spec_of("gemma2", **large | {"query_pre_attn_scalar": 8}), tied=True)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "cohere"])
def test_an_unsupported_untied_head_is_refused(model_type: str) -> None:
    with pytest.raises(NotExpressible, match=r"this model has an untied LM head; use --to hf or --to onnx"):
        architecture(spec_of(model_type), tied=False)


@pytest.mark.parametrize("model_type", ["gpt_neox", "olmo2", "stablelm"])
def test_a_missing_untied_head_is_refused(model_type: str) -> None:
    with pytest.raises(NotExpressible, match=r"requires an untied LM head for this architecture, .* use --untie"):
        architecture(spec_of(model_type), tied=True)


def test_an_untied_gemma_stops_the_plan(tmp_path: Path) -> None:
    base = build("gemma", tmp_path / "gemma", tie_word_embeddings=False)
    with pytest.raises(
        NotExpressible, match=r"gguf: gemma: llama.cpp ties the LM head of this architecture to the embedding"
    ):
        plan_gguf(merged(base))


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("qwen3", {"attention_bias": True}, "qwen3: this model has a bias for self_attn.o_proj"),
        ("starcoder2", {"use_bias": False}, "starcoder2: this model has no bias for mlp.down_proj"),
        ("gpt_neox", {"attention_bias": False}, "gptneox: this model has no bias for self_attn.o_proj"),
        ("seed_oss", {"attention_out_bias": True}, "seed_oss: this model has a bias for self_attn.o_proj"),
    ],
)
def test_biases_that_do_not_fit_llama_cpp_are_refused(
    tmp_path: Path, name: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(NotExpressible, match=f"gguf: {reason}"):
        plan_gguf(merged(build(name, tmp_path / name, **settings)))


def test_a_config_that_promises_a_bias_needs_one(tmp_path: Path) -> None:
    base = build("stablelm", tmp_path / "stablelm", use_qkv_bias=False)
    config = base / "config.json"
    config.write_text(config.read_text().replace('"use_qkv_bias": false', '"use_qkv_bias": true'))
    with pytest.raises(
        TensorMismatch, match=r"q_proj.bias: expected shape \(64,\) according to config.json, found no tensor"
    ):
        plan_gguf(merged(base))


def test_an_ignored_window_is_noted() -> None:
    ignored = "llama.cpp ignores the sliding window of this architecture"
    note = f"{ignored}, so texts of more than 16 tokens give other logits than in transformers"
    mistral, phi3 = spec_of("mistral", sliding_window=16), spec_of("phi3", sliding_window=16)
    assert notes(mistral, FAMILIES["mistral"].llama_cpp) == notes(phi3, FAMILIES["phi3"].llama_cpp) == [note]
    wide = replace(mistral, max_positions=16)
    assert notes(wide, FAMILIES["mistral"].llama_cpp) == []
    assert notes(spec_of("gemma2", sliding_window=16), FAMILIES["gemma2"].llama_cpp) == []


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"gemma3", "mistral3"}))
def test_a_window_is_written_where_llama_cpp_reads_one_and_noted_where_it_reads_none(model_type: str) -> None:
    settings = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1, "n_embd": 32, "n_head": 4}
    spec, row = spec_of(model_type, **settings, n_layer=4), FAMILIES[model_type].llama_cpp
    noted = any("ignores the sliding window" in note for note in notes(spec, row))
    names = [key.name for key in decoder_keys(row, spec, "F32", head_length=False)]
    written = f"{row.name}.attention.sliding_window" in names
    assert (model_type in WINDOWED) == (spec.attention.window is not None)
    assert written == (model_type in READ or model_type == "phi3")
    assert noted == (model_type in WINDOWED - READ)


def test_an_exact_gelu_is_noted() -> None:
    assert "tanh approximation" in notes(spec_of("gpt_neox"), FAMILIES["gpt_neox"].llama_cpp)[0]
    assert notes(spec_of("gpt_neox", hidden_act="gelu_new"), FAMILIES["gpt_neox"].llama_cpp) == []
