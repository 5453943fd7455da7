"""LoRA on stacked experts, stored as one tensor or one per expert: the merge equals the unmerged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from exporter.cli.main import run
from exporter.tensors import Array
from exporter.verify.runtimes.rounding import rounded
from exporter.verify.tolerances import HF_ROUNDING_SHARE
from tests.merge.tuned import attached, merge, reloaded

SHAPE: Any = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=48, num_local_experts=3),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, intermediate_size=48, moe_intermediate_size=24, num_experts=3, num_experts_per_tok=2
    ),
    # Stored as one stack, (experts, in, out).
    "gpt_oss": GptOssConfig(**SHAPE, intermediate_size=48, num_local_experts=3, num_experts_per_tok=2),
}
BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
IDS = torch.arange(2, 50)[None]


def logits(model: Any) -> Array:
    with torch.no_grad():
        out: Array = model(input_ids=IDS).logits.numpy()
    return out


@pytest.fixture(scope="session", params=list(CONFIGS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("experts") / request.param
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32)
    model.save_pretrained(path)
    return path


def tuned(base: Path, path: Path, targets: tuple[str, ...]) -> Array:
    """Write a LoRA on ``targets`` to ``path``; returns the logits of stock PEFT with it, unmerged."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules=[], target_parameters=list(targets))
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn_like(value) * 0.1)
    model.save_pretrained(path)
    reloaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    return logits(reloaded.eval())


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
def test_experts_are_merged_as_trained(base: Path, targets: tuple[str, ...], tmp_path: Path) -> None:
    want = tuned(base, tmp_path / "adapter", targets)
    out = tmp_path / "out"
    assert run(["merge", str(tmp_path / "adapter"), "--base", str(base), "-o", str(out), "--verify", "rows"]) == 0
    merged: Any = AutoModelForCausalLM.from_pretrained(out)
    assert np.abs(logits(merged.eval()) - want).max() <= 1e-5
    untuned: Any = AutoModelForCausalLM.from_pretrained(base)
    assert np.abs(logits(untuned.eval()) - want).max() > 1e-2
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert all(".experts." in name for name in changed)


def test_the_checker_detects_a_missing_expert(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "adapter", BOTH)
    out = tmp_path / "out"
    assert run(["merge", str(tmp_path / "adapter"), "--base", str(base), "-o", str(out)]) == 0
    checking = ["verify", str(out), "--reference", str(base), "--adapter", str(tmp_path / "adapter"), "--level", "rows"]
    assert run(checking) == 0
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    name = next(name for name in sorted(before) if not np.array_equal(before[name], after[name]))
    save_file(after | {name: before[name]}, out / "model.safetensors", {"format": "pt"})
    assert run(checking) == 3


def test_the_rounded_reference_is_what_stacks_compute_in_16_bits(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "adapter", BOTH)
    half = merge(base, [], tmp_path / "half", dtype="BF16")
    out = reloaded(merge(half, [tmp_path / "adapter"], tmp_path / "out"))
    model = attached(reloaded(half), [tmp_path / "adapter"])
    as_trained = logits(model)
    with rounded(model, torch.bfloat16, vectors=True):
        want = logits(model)
    assert np.array_equal(logits(model), as_trained), "the model is unchanged"
    assert np.abs(want - as_trained).max() > 1e-4
    assert np.abs(logits(out) - want).max() <= HF_ROUNDING_SHARE * np.abs(want - as_trained).max()
