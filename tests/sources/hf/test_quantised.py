"""Which checkpoints count as quantised, by which method, and how the checkpoint before quantisation is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.full_precision import full_precision_name
from exporter.sources.hf.quantised import quantiser_floats
from fixtures.models.quantised import METHODS, build_mxfp4, quantise

NAMES = {
    "bnb 4bit": "bitsandbytes (4 bits)",
    "bnb 8bit": "bitsandbytes (8 bits)",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed": "compressed-tensors",
    "fp8": "FP8",
    "compressed fp8": "FP8 (compressed-tensors)",
}
PLAIN = {"fp8", "compressed fp8"}


def found(folder: Path) -> tuple[str, bool]:
    quantisation = Checkpoint.open(folder).quantisation
    assert quantisation is not None
    return quantisation.method, quantisation.plain_rows


@pytest.mark.parametrize("method", METHODS)
def test_config_and_tensors_each_show_the_method(method: str, tiny_tied: Path, tmp_path: Path) -> None:
    assert found(quantise(tiny_tied, tmp_path / "both", method)) == (NAMES[method], method in PLAIN)
    silent = quantise(tiny_tied, tmp_path / "tensors", method, states=False)
    assert found(silent) == (NAMES[method].removesuffix(" (compressed-tensors)"), method in PLAIN)
    (silent / "model.safetensors").write_bytes((tiny_tied / "model.safetensors").read_bytes())
    assert Checkpoint.open(silent).quantisation is None
    stated = json.loads((silent / "config.json").read_text()) | {"quantization_config": dict(METHODS[method][1])}
    (silent / "config.json").write_text(json.dumps(stated))
    assert found(silent) == (NAMES[method], method in PLAIN)


def test_mxfp4_experts_are_found_by_config_and_by_tensors(tmp_path: Path) -> None:
    folder = build_mxfp4(tmp_path / "base")
    assert found(folder) == ("MXFP4", True)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert found(folder) == ("MXFP4", True)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "GPTQ"),
        ({"compression_config": {"config_groups": {}, "format": "pack-quantized"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "NVFP4 (ModelOpt)"),
        ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
        ({"quantization_config": {"quant_method": "new-method"}}, "new-method"),
        ({"quantization_config": {"quant_method": "two\nlines"}}, "an unnamed method"),
        ({"quantization_config": {"config_groups": {"a": 1}, "format": "float-quantized"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "an unnamed method"),
    ],
)
def test_other_places_and_methods_in_a_config(
    config: dict[str, Any], method: str, tiny_tied: Path, tmp_path: Path
) -> None:
    folder = quantise(tiny_tied, tmp_path / "base", "fp8", states=False, **config)
    assert found(folder) == (method, False)


def test_scales_beside_an_unquantised_matrix_are_not_a_quantisers(tiny_tied: Path, tmp_path: Path) -> None:
    folder = quantise(tiny_tied, tmp_path / "base", "fp8", states=False)
    plain = load_file(tiny_tied / "model.safetensors") | {"logit_scale": torch.ones(()), "norm.scales": torch.ones(4)}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.quantisation is None
    assert not quantiser_floats(checkpoint.tensors)


@pytest.mark.parametrize("method", METHODS)
def test_the_floats_of_the_quantiser_are_told_from_those_of_the_model(
    method: str, tiny_tied: Path, tmp_path: Path
) -> None:
    tensors = Checkpoint.open(quantise(tiny_tied, tmp_path / "base", method)).tensors
    added = tensors.keys() - Checkpoint.open(tiny_tied).tensors.keys()
    floats = {name for name in added if tensors[name].spec.dtype in ("F32", "F16", "BF16")}
    assert floats
    assert quantiser_floats(tensors) == floats


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "unsloth/Llama-3.2-1B-Instruct"),
        ("unsloth/phi-4-unsloth-bnb-4bit", "unsloth/phi-4"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen3-8B-FP8", "Qwen/Qwen3-8B"),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "Mistral-7B-v0.1"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "Meta-Llama-3.1-8B-Instruct"),
        ("/models/Llama-3.2-1B-bnb-4bit", "Llama-3.2-1B"),
        ("openai/gpt-oss-20b", None),
        ("deepseek-ai/DeepSeek-V3", None),
    ],
)
def test_a_name_tells_the_checkpoint_before_quantisation(name: str, before: str | None) -> None:
    assert full_precision_name({}, [name]) == before


def test_the_config_tells_before_the_name() -> None:
    config = {"_name_or_path": "meta-llama/Llama-3.2-1B"}
    assert full_precision_name(config, ["me/small-llama-bnb-4bit"]) == "meta-llama/Llama-3.2-1B"
    assert full_precision_name({"_name_or_path": "/home/me/models/x"}, ["me/x-AWQ"]) == "me/x"
    assert full_precision_name({"_name_or_path": "me/native"}, ["me/native"]) is None
