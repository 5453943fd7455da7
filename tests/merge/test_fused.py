"""Adapters of modules that the checkpoint stores together with other modules, as slices of one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeForConditionalGeneration

from exporter.cli.main import run
from fixtures.zoo.adapters import write
from fixtures.zoo.build import config_of, load
from tests.session.zoo import ZooCheckpoint

Capture = pytest.CaptureFixture[str]
HRM: Final = "hrm_text"
JINA: Final = "jina_embeddings_v3:mlm"
QKV: Final = ("q_proj", "k_proj", "v_proj")
#: Model of the zoo, settings of LoraConfig, names of the stored tensors that change.
MERGED: Final[dict[str, tuple[str, dict[str, Any], tuple[str, ...]]]] = {
    "LoRA on one of four slices": (HRM, {"target_modules": ["q_proj"]}, ("gqkv_proj.weight",)),
    "DoRA on one of two slices": (HRM, {"target_modules": ["up_proj"], "use_dora": True}, ("gate_up_proj.weight",)),
    "DoRA on all slices": (
        HRM,
        {"target_modules": "all-linear", "use_dora": True},
        ("gqkv_proj.weight", "o_proj.weight", "gate_up_proj.weight", "down_proj.weight"),
    ),
    "DoRA on three square slices": (JINA, {"target_modules": list(QKV), "use_dora": True}, ("Wqkv.weight",)),
    "bias of one slice": (JINA, {"target_modules": ["k_proj"], "lora_bias": True}, ("Wqkv.weight", "Wqkv.bias")),
    "biases of all slices": (JINA, {"target_modules": list(QKV), "lora_bias": True}, ("Wqkv.weight", "Wqkv.bias")),
}


def lora(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    return write(load(base), LoraConfig(r=4, lora_alpha=6, **settings), folder, seed=seed)


def merge(base: Path, out: Path, *adapters: Path, options: tuple[str, ...] = ()) -> int:
    return run(["merge", *map(str, adapters), "--base", str(base), "-o", str(out), "-q", *options])


def require_as_peft_merges(base: Path, adapter: Path, out: Path) -> None:
    merged: Any = PeftModel.from_pretrained(load(base), adapter)
    wanted = merged.merge_and_unload().state_dict()
    given = load(out).state_dict()
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(given[name], value, rtol=0, atol=1e-5 * float(value.abs().max())), name


def changed(base: Path, out: Path) -> set[str]:
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", MERGED)
def test_a_slice_of_a_fused_tensor_is_merged_as_peft_merges(
    name: str, zoo_checkpoint: ZooCheckpoint, tmp_path: Path
) -> None:
    model, settings, tensors = MERGED[name]
    base = zoo_checkpoint(model)
    adapter = lora(base, tmp_path / "adapter", **settings)
    assert merge(base, tmp_path / "out", adapter, options=("--verify", "weights")) == 0
    require_as_peft_merges(base, adapter, tmp_path / "out")
    expected = {name for name in load_file(base / "model.safetensors") if name.endswith(tensors)}
    assert {name for name in changed(base, tmp_path / "out") if "lm_head" not in name} == expected


def test_a_saved_stack_of_experts_is_divided_among_its_stored_matrices(
    zoo_checkpoint: ZooCheckpoint, tmp_path: Path
) -> None:
    base = zoo_checkpoint("mixtral")
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["experts"])
    assert merge(base, tmp_path / "out", adapter, options=("--verify", "weights")) == 0
    require_as_peft_merges(base, adapter, tmp_path / "out")
    names = {name.rpartition(".experts.")[2] for name in changed(base, tmp_path / "out") if ".experts." in name}
    experts = range(load(base).config.num_local_experts)
    assert names == {f"{expert}.{matrix}.weight" for expert in experts for matrix in ("w1", "w2", "w3")}


def test_updates_of_experts_that_are_stored_transposed(tmp_path: Path) -> None:
    """Published checkpoints of Qwen3-VL store each expert as (in, out), and transformers transposes the experts."""
    config = config_of("qwen3_vl_moe")
    config.text_config.moe_intermediate_size = 48
    torch.manual_seed(0)
    model: Any = Qwen3VLMoeForConditionalGeneration(config).float()
    base = tmp_path / "base"
    model.save_pretrained(base)
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    experts = {name: value.mT.contiguous() for name, value in tensors.items() if ".mlp.experts." in name}
    save_file({**tensors, **experts}, weights, {"format": "pt"})
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = lora(base, tmp_path / "adapter", target_modules=[], target_parameters=stacks)
    assert merge(base, tmp_path / "out", adapter, options=("--verify", "weights")) == 0
    require_as_peft_merges(base, adapter, tmp_path / "out")
    assert changed(base, tmp_path / "out") == experts.keys()
    assert all(load_file(tmp_path / "out" / "model.safetensors")[name].shape == experts[name].shape for name in experts)


@pytest.mark.parametrize(
    ("setting", "end", "reason"),
    [
        ("lora_bias", ".lora_B.bias", "expected a bias of shape (64,), found (63,)"),
        (
            "use_dora",
            ".lora_magnitude_vector",
            "expected a DoRA magnitude for each row or column of a tensor of shape (64, 64), found 63",
        ),
    ],
)
def test_a_vector_of_the_wrong_length_is_refused(
    setting: str, end: str, reason: str, zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    base = zoo_checkpoint(JINA)
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj"], **{setting: True})
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith(end))
    save_file({**tensors, key: tensors[key][1:].clone()}, weights, {"format": "pt"})
    assert merge(base, tmp_path / "out", adapter) == 4
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("second", ["q_proj", "v_proj"])
def test_a_second_adapter_of_a_tensor_that_dora_scales_is_refused(
    second: str, zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    base = zoo_checkpoint(JINA)
    first = lora(base, tmp_path / "first", target_modules=["q_proj"], use_dora=True)
    other = lora(base, tmp_path / "second", seed=1, target_modules=[second])
    for adapters in ((first, other), (other, first)):
        assert merge(base, tmp_path / "out", *adapters) == 4
        line = capsys.readouterr().err
        assert "expected a DoRA update to be the only update of roberta.encoder.layers.0.mixer.Wqkv.weight" in line
        assert f"found another update in {adapters[0]}" in line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["v_proj"]}, {"bias": "all"}], ids=["saved module", "trained biases"]
)
def test_a_whole_new_slice_of_a_fused_tensor_is_refused(
    settings: dict[str, Any], zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    base = zoo_checkpoint(JINA)
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    assert merge(base, tmp_path / "out", adapter) == 5
    line = capsys.readouterr().err
    assert "the base stores this module together with other modules in one tensor" in line
    assert "merge with PEFT's merge_and_unload()" in line
    assert not (tmp_path / "out").exists()


def test_a_fused_tensor_that_cannot_be_divided_is_refused(
    zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    sound = zoo_checkpoint(JINA)
    adapter = lora(sound, tmp_path / "adapter", target_modules=["q_proj"])
    base = tmp_path / "base"
    base.mkdir()
    for file in sound.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    name = "roberta.encoder.layers.0.mixer.Wqkv.weight"
    save_file({**tensors, name: tensors[name][:2].clone()}, base / "model.safetensors", {"format": "pt"})
    assert merge(base, tmp_path / "out", adapter) == 4
    assert "expected a module of the base, found roberta.layers.0.self_attn.q_proj (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
