"""Every family: the bytes of llama.cpp's converter, and the logits of transformers."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from exporter.errors import TensorMismatch
from exporter.formats.gguf import plan_gguf
from fixtures.models.families import FAMILIES, build, build_vision
from fixtures.tiny import PROMPTS
from tests.conformance.gguf import (
    CHANGES,
    FAMILY_GOLDEN,
    brief,
    convert_family,
    digest,
    fingerprint,
    merge_rows,
    required_converter,
    row_adapter,
)
from tests.formats.gguf.conftest import Write, merged

#: The limit of the format. Rounding gives about 1e-12, and 2e-7 with llama.cpp's GELU, a look-up in a float16 table.
KL_LIMIT = 1e-6

Build = Callable[[str], Path]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """family(name): the tiny checkpoint of a family, built once."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = build(name, tmp_path_factory.mktemp("family") / "model")
        return built[name]

    return get


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(FAMILY_GOLDEN.read_text(encoding="utf-8"))
    return table


@pytest.mark.parametrize("name", FAMILIES)
def test_file_equals_that_of_llama_cpps_converter(
    name: str, golden: dict[str, Any], family: Build, write: Write
) -> None:
    assert brief(digest(write(family(name)))) == golden[f"{name}-BF16"]
    assert fingerprint(brief(digest(write(family(name), ftype="Q8_0")))) == golden[f"{name}-Q8_0"]


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_file_equals_what_the_converter_makes_of_the_merged_checkpoint(
    name: str, golden: dict[str, Any], family: Build, write: Write, tmp_path: Path
) -> None:
    adapter = row_adapter(family(name), tmp_path / "adapter")
    assert fingerprint(brief(digest(write(family(name), adapter)))) == golden[f"{name}-merged"]
    assert fingerprint(golden[f"{name}-BF16"]) != golden[f"{name}-merged"]


@pytest.mark.converter
@pytest.mark.parametrize("name", FAMILIES)
def test_golden_digests_are_those_of_the_installed_converter(
    name: str, golden: dict[str, Any], family: Build, tmp_path: Path
) -> None:
    root = required_converter()
    base = family(name)
    assert convert_family(root, name, base, tmp_path / "base.gguf", "BF16") == golden[f"{name}-BF16"]
    q8_0 = convert_family(root, name, base, tmp_path / "q8_0.gguf", "Q8_0")
    assert fingerprint(q8_0) == golden[f"{name}-Q8_0"]
    merged = convert_family(root, name, merge_rows(base, tmp_path / "merged"), tmp_path / "merged.gguf", "BF16")
    assert fingerprint(merged) == golden[f"{name}-merged"]


def test_changes_to_the_converter_are_explained() -> None:
    assert CHANGES.keys() <= FAMILIES.keys()
    assert all(reason for _, reason in CHANGES.values())


def mean_kl(base: Path, file: Path, *, repeat: int = 1) -> float:
    """Mean KL of llama.cpp's logits on ``file`` from those of transformers in float32, over the prompts."""
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    ids = AutoTokenizer.from_pretrained(base)(" ".join(PROMPTS))["input_ids"] * repeat
    sees = "vision_config" in (base / "config.json").read_text()
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = auto.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    got = torch.from_numpy(runtime.logits(file, ids)).double().log_softmax(-1)
    value = float((want.exp() * (want - got)).sum(-1).mean())
    assert not math.isnan(value)
    return value


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_file_computes_what_transformers_computes(name: str, family: Build, write: Write) -> None:
    assert mean_kl(family(name), write(family(name), ftype="F32")) <= KL_LIMIT


LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
THETA = {"rope_type": "default", "rope_theta": 50000.0}
PARTIAL = {**THETA, "partial_rotary_factor": 0.5}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
#: llama.cpp reads windows only in the size of EXAONE 4 with 64 layers.
DEEP = {
    "num_hidden_layers": 64,
    "intermediate_size": 32,
    "sliding_window": 8,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16,
}

#: family, changes to its config, how often the prompts are repeated, keys that the converter omits or gets wrong
VARIANTS: list[tuple[str, dict[str, Any], int, tuple[str, ...]]] = [
    ("qwen2", {"rope_parameters": LINEAR}, 1, ()),
    ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}}, 1, ()),
    ("qwen3", {"rope_parameters": YARN}, 8, ()),
    ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}}, 1, ()),
    ("gemma3_text", {"tie_word_embeddings": False, "final_logit_softcapping": 3.0}, 1, ()),
    ("gpt2", {"n_inner": 96}, 1, ("gpt2.feed_forward_length",)),
    ("gpt_neox", {"use_parallel_residual": False}, 1, ()),
    ("gpt_neox", {"rope_parameters": PARTIAL}, 1, ("gptneox.rope.freq_base", "gptneox.rope.dimension_count")),
    ("gemma", {"rope_parameters": THETA}, 1, ("gemma.rope.freq_base",)),
    ("stablelm", {"rope_parameters": PARTIAL}, 1, ("stablelm.rope.freq_base",)),
    ("granite", {"attention_bias": True, "mlp_bias": True}, 1, ()),
    ("exaone4", DEEP, 1, ()),
    ("phi4_mini", {}, 8, ()),  # longer than the original context, so the long factors apply
]
VARIANT_IDS = [f"{name}-{'-'.join(changes) or 'long'}" for name, changes, _, _ in VARIANTS]


@pytest.mark.parametrize(("name", "changes", "repeat", "keys"), VARIANTS, ids=VARIANT_IDS)
def test_variants_compute_what_transformers_computes(
    name: str, changes: dict[str, Any], repeat: int, keys: tuple[str, ...], write: Write, tmp_path: Path
) -> None:
    base = build(name, tmp_path / "base", **changes)
    assert mean_kl(base, write(base, ftype="F32"), repeat=repeat) <= KL_LIMIT


@pytest.mark.converter
@pytest.mark.parametrize(("name", "changes", "repeat", "keys"), VARIANTS, ids=VARIANT_IDS)
def test_variants_equal_the_converters_except_for_keys_that_it_omits_or_gets_wrong(
    name: str, changes: dict[str, Any], repeat: int, keys: tuple[str, ...], write: Write, tmp_path: Path
) -> None:
    root = required_converter()
    base = build(name, tmp_path / "base", **changes)
    ours = brief(digest(write(base)))
    theirs = convert_family(root, name, base, tmp_path / "theirs.gguf", "BF16")
    different = {key for key in ours["keys"] | theirs["keys"] if ours["keys"].get(key) != theirs["keys"].get(key)}
    assert (different, ours["tensors"]) == (set(keys), theirs["tensors"])


@pytest.mark.parametrize(
    ("name", "changes"), [("gemma2", {"sliding_window": 4}), ("gemma3_text", {"rms_norm_eps": 0.1})], ids=str
)
def test_a_file_of_other_settings_exceeds_the_limit(
    name: str, changes: dict[str, Any], family: Build, write: Write, tmp_path: Path
) -> None:
    other = build(name, tmp_path / "other", **changes)
    assert mean_kl(family(name), write(other, ftype="F32")) > KL_LIMIT


def test_a_float16_gemma_equals_the_converters(write: Write, tmp_path: Path, golden: dict[str, Any]) -> None:
    base = build("gemma", tmp_path / "gemma", dtype="float16")
    assert fingerprint(brief(digest(write(base)))) == golden["gemma-F16"]


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_a_multimodal_model_gives_the_file_of_its_text_model(
    name: str, write: Write, tmp_path: Path, golden: dict[str, Any]
) -> None:
    base = build_vision(tmp_path / "seeing", name)
    layout = plan_gguf(merged(base))
    reason = "omitted, because the tensor is not part of the text decoder"
    assert {rule for name, rule in layout.dropped.items() if "vision" in name} == {reason}
    assert "mmproj" in layout.notes[0]
    assert fingerprint(brief(digest(write(base)))) == golden[name]
    assert mean_kl(base, write(base, ftype="F32")) <= KL_LIMIT


def rewrite(base: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of a checkpoint with other tensors."""
    copy = Path(shutil.copytree(base, path))
    save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors", {"format": "pt"})
    return copy


def test_gpt2_as_first_published_gives_the_same_file(
    family: Build, write: Write, tmp_path: Path, golden: dict[str, Any]
) -> None:
    def first_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 512, 512, dtype=torch.bfloat16) for layer in range(2)}
        return {name.removeprefix("transformer."): value for name, value in tensors.items()} | masks

    base = rewrite(family("gpt2"), tmp_path / "gpt2", first_names)
    assert brief(digest(write(base))) == golden["gpt2-BF16"]


def test_experts_of_two_dtypes_are_named(family: Build, tmp_path: Path) -> None:
    odd = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    base = rewrite(family("mixtral"), tmp_path / "mixtral", lambda tensors: tensors | {odd: tensors[odd].float()})
    with pytest.raises(
        TensorMismatch, match=rf"{re.escape(odd)}: expected BF16, the dtype of .*experts.0.w3.weight, found F32"
    ):
        plan_gguf(merged(base), "BF16")


def test_a_missing_expert_is_named(family: Build, tmp_path: Path) -> None:
    lost = "model.layers.0.mlp.experts.3.down_proj.weight"
    base = rewrite(
        family("qwen3_moe"), tmp_path / "moe", lambda tensors: {name: tensors[name] for name in tensors if name != lost}
    )
    with pytest.raises(TensorMismatch, match=rf"{re.escape(lost)}: expected shape \(64, 32\) .*found no tensor"):
        plan_gguf(merged(base))
