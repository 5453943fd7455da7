"""Quantised artifacts of adapters that change more than rows are compared with the base in the same quantisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporter.cli.main import run
from exporter.verify.tolerances import QUANTISED_EXCESS
from tests.support.documents import read_report

ROWS = [5, 300]


@pytest.fixture(scope="module")
def updated(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of two matrices and rows of two tokens, by stock PEFT, with a large effect on the logits."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["v_proj", "down_proj"], trainable_token_indices=ROWS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_tied), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                weight.add_(torch.randn(weight.shape) * 0.1)
    out = tmp_path_factory.mktemp("adapter") / "updated"
    model.save_pretrained(str(out), save_embedding_layers=False)
    AutoTokenizer.from_pretrained(tiny_tied).save_pretrained(out)
    return out


@pytest.mark.parametrize(("target", "quant"), [("gguf", "Q8_0"), ("onnx", "int8")])
def test_a_quantised_update_is_no_farther_from_the_tuned_model_than_its_base_from_itself(
    tiny_tied: Path, updated: Path, tmp_path: Path, target: str, quant: str
) -> None:
    argv = ["merge", str(updated), "--base", str(tiny_tied), "--to", target, "--quant", quant, "--verify", "full", "-q"]
    assert run([*argv, "-o", str(tmp_path / "out"), "--report", str(tmp_path / "report")]) == 0
    checks = [check for artifact in read_report(tmp_path / "report")["artifacts"] for check in artifact["checks"]]
    values = [check["value"] for check in checks if check["name"].endswith("excess KL")]
    assert values
    # An excess far below zero would mean that the base differs from its reference by the update.
    assert max(map(abs, values)) <= QUANTISED_EXCESS
