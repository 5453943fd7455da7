"""Adapters as a GGUF LoRA, in llama.cpp on the base's own GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile
from exporter.verify.expect.reference import Reference
from exporter.verify.gguf.lora import check_lora
from fixtures.peft_adapters import perturb
from tests.formats.gguf import runtime
from tests.formats.gguf.test_llama_cpp import mean_kl, reference
from tests.support.trained import TRAINED_IDS

Capture = pytest.CaptureFixture[str]
WEIGHTS = "adapter_model.safetensors"
IDS = [1, 300, 40, 17, 9, 2, 61, 300]


def succeed(*args: object) -> None:
    assert run([*map(str, args), "-q"]) == 0


@pytest.fixture(scope="module")
def base(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "base.gguf"
    succeed("export", tiny_untied, "--to", "gguf", "--quant", "F32", "-o", out)
    return out


@pytest.fixture(scope="module")
def beside(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token rows beside a LoRA of attention and MLP, by stock PEFT, with an alpha that is no power of two."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_untied)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"]
    tokens = {"embed_tokens": list(TRAINED_IDS)}
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, trainable_token_indices=tokens)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                weight.add_(torch.randn(weight.shape) * 0.1)
    out = tmp_path_factory.mktemp("adapter") / "beside"
    wrapped.save_pretrained(str(out), save_embedding_layers=False)
    AutoTokenizer.from_pretrained(tiny_untied).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def saved(
    tiny_untied: Path, tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[tuple[str, str], Path]:
    """(tie, what is trained) → a LoRA as PEFT saves it with the embeddings."""
    from peft import LoraConfig, get_peft_model

    folder, adapters = tmp_path_factory.mktemp("saved"), {}
    for tie, name, settings in (
        ("untied", "head", {"target_modules": ["q_proj", "lm_head"]}),
        ("untied", "rows", {"target_modules": ["q_proj"], "trainable_token_indices": list(TRAINED_IDS)}),
        ("tied", "attention", {"target_modules": ["q_proj"]}),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained({"tied": tiny_tied, "untied": tiny_untied}[tie])
        wrapped = get_peft_model(model, LoraConfig(r=4, **settings))
        perturb(wrapped, 0)
        out = adapters[tie, name] = folder / f"{tie}-{name}"
        wrapped.save_pretrained(str(out), save_embedding_layers=True)
        assert [key for key, value in load_torch(out / WEIGHTS).items() if value.shape == (512, 64)]
    return adapters


@pytest.mark.parametrize("which", [("untied", "head"), ("untied", "rows"), ("tied", "attention")])
def test_a_saved_matrix_that_is_the_bases_own_is_ignored(
    saved: Mapping[tuple[str, str], Path], tiny_untied: Path, tiny_tied: Path, tmp_path: Path, which: tuple[str, str]
) -> None:
    adapter, checkpoint = saved[which], {"tied": tiny_tied, "untied": tiny_untied}[which[0]]
    succeed("merge", adapter, "--to", "gguf-lora", "--verify", "full", "-o", tmp_path / "l.gguf")
    succeed("export", checkpoint, "--to", "gguf", "--quant", "F32", "-o", tmp_path / "base.gguf")
    want = reference(checkpoint, adapter, IDS)
    assert mean_kl(want, runtime.logits(tmp_path / "base.gguf", IDS, lora=tmp_path / "l.gguf")) <= 1e-6
    assert mean_kl(want, runtime.logits(tmp_path / "base.gguf", IDS)) > 1e-3


def test_a_saved_matrix_with_another_row_is_refused_and_fails_the_check(
    saved: Mapping[tuple[str, str], Path], tiny_untied: Path, tmp_path: Path, capsys: Capture
) -> None:
    succeed("merge", saved["untied", "rows"], "--to", "gguf-lora", "-o", tmp_path / "l.gguf")
    adapter = Path(shutil.copytree(saved["untied", "rows"], tmp_path / "other"))
    tensors = {name: value.clone() for name, value in load_torch(adapter / WEIGHTS).items()}
    (name,) = (name for name in tensors if name.endswith("lm_head.weight"))
    tensors[name][511] = 7
    save_torch(tensors, adapter / WEIGHTS, {"format": "pt"})
    assert run(["merge", str(adapter), "--to", "gguf-lora", "-o", str(tmp_path / "x.gguf")]) == 5
    assert "an adapter replaces the whole tensor" in capsys.readouterr().err
    checks = check_lora(tmp_path / "l.gguf", Reference.open(tiny_untied, [adapter]), every=True)
    assert [check.name for check in checks if not check.passed] == ["output.weight rows"]


@pytest.mark.parametrize("level", ["rows", "weights", "full"])
def test_rows_and_updates_compute_what_the_unmerged_adapter_computes(
    base: Path, tiny_untied: Path, tiny_both_adapter: Path, beside: Path, tmp_path: Path, level: str
) -> None:
    for number, adapter in enumerate((tiny_both_adapter, beside)):
        lora = tmp_path / f"{number}.gguf"
        succeed("merge", adapter, "--to", "gguf-lora", "--verify", level, "-o", lora)
        want = reference(tiny_untied, adapter, IDS)
        assert mean_kl(want, runtime.logits(base, IDS, lora=lora)) <= 1e-6  # as the merged float32 file
        assert mean_kl(want, runtime.logits(base, IDS)) > 1e-3


def test_a_lora_beside_other_formats_is_verified_with_them(
    tiny_untied: Path, tiny_both_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    succeed("merge", tiny_both_adapter, "--to", "gguf", "--to", "gguf-lora", "-o", out)
    assert sorted(path.name for path in out.iterdir()) == ["gguf", "gguf-lora", "report.json"]
    args = ["--reference", tiny_untied, "--adapter", tiny_both_adapter, "--level", "rows"]
    succeed("verify", out, *args)
    assert run(["verify", str(out), "--reference", str(tiny_untied), "--level", "weights", "-q"]) == 3


def test_rows_alone_are_exact_and_their_number_is_the_rank(
    tiny_untied: Path, tiny_both_adapter: Path, tmp_path: Path
) -> None:
    succeed("merge", tiny_both_adapter, "--to", "gguf-lora", "-o", tmp_path / "l.gguf")
    file = GgufFile.open(tmp_path / "l.gguf")
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        "output.weight.lora_a": (3, 64),
        "output.weight.lora_b": (512, 3),
        "token_embd.weight.lora_a": (512, 3),
        "token_embd.weight.lora_b": (64, 3),
    }
    assert file.metadata["adapter.lora.alpha"] == 0


def test_the_rank_beside_an_update_is_chosen_so_that_scaling_is_exact(beside: Path, tmp_path: Path) -> None:
    succeed("merge", beside, "--to", "gguf-lora", "-o", tmp_path / "l.gguf")
    file = GgufFile.open(tmp_path / "l.gguf")
    assert file.metadata["adapter.lora.alpha"] == 12
    # 3 rows, alpha 12: at rank 3 llama.cpp multiplies by 4.
    assert file.tensors["token_embd.weight.lora_a"].shape == (512, 3)
    assert set(np.unique(file.dequantize_rows("token_embd.weight.lora_a", 0, 512))) == {0.0, 0.25}


def test_a_lora_is_no_base_of_a_patch_and_has_no_head(
    tiny_untied: Path, tiny_untied_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    lora = tmp_path / "lora.gguf"
    succeed("merge", tiny_untied_adapter, "--base", tiny_untied, "--to", "gguf-lora", "-o", lora)
    assert run(["patch", str(lora), str(tiny_untied_adapter), "--trust-base", "-o", str(tmp_path / "x.gguf")]) == 4
    assert f"{lora}: token_embd.weight: expected an input embedding, found no such tensor" in capsys.readouterr().err
    assert run(["inspect", str(lora), "--json"]) == 0
    assert "head" not in json.loads(capsys.readouterr().out)["facts"]


def test_ordinary_lora_has_the_unchanged_factors_of_the_adapter(
    tiny_untied: Path, beside: Path, tmp_path: Path
) -> None:
    succeed("merge", beside, "--to", "gguf-lora", "-o", tmp_path / "l.gguf")
    file = GgufFile.open(tmp_path / "l.gguf")
    stored = load_file(beside / "adapter_model.safetensors")
    start = "base_model.model.model.layers.1.mlp.down_proj"
    for end in "AB":
        name = f"blk.1.ffn_down.weight.lora_{end.lower()}"
        factor = file.dequantize_rows(name, 0, file.tensors[name].n_rows)
        assert np.array_equal(factor, stored[f"{start}.lora_{end}.weight"])


def test_tied_base_is_refused_with_the_command_that_works(tiny_adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(["merge", str(tiny_adapter), "--to", "gguf-lora", "-o", str(tmp_path / "l.gguf")]) == 5
    error = capsys.readouterr().err
    assert "tied" in error
    assert f"ttexport patch BASE.gguf {tiny_adapter} -o OUT.gguf" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["new tokens", "checkpoint", "whole norm"])
def test_changes_that_a_lora_cannot_represent_are_refused(
    tiny_untied: Path, beside: Path, wide_adapters: dict[str, Path], tmp_path: Path, capsys: Capture, change: str
) -> None:
    args = ["merge", str(wide_adapters["untied-new"])]
    if change == "checkpoint":
        args = ["export", str(tiny_untied)]
    elif change == "whole norm":
        adapter = Path(shutil.copytree(beside, tmp_path / "norm"))
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": ["norm"]}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        path = adapter / "adapter_model.safetensors"
        save_file({**load_file(path), "base_model.model.model.norm.weight": np.full(64, 2, np.float32)}, path)
        args = ["merge", str(adapter)]
    assert run([*args, "--to", "gguf-lora", "-o", str(tmp_path / "l.gguf")]) == 5
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("tensor", "check"),
    [("token_embd.weight.lora_b", "token_embd.weight rows"), ("blk.0.attn_q.weight.lora_b", "updates")],
)
def test_every_check_of_a_lora_can_fail(
    tiny_untied: Path, beside: Path, tmp_path: Path, tensor: str, check: str
) -> None:
    out = tmp_path / "l.gguf"
    succeed("merge", beside, "--to", "gguf-lora", "-o", out)
    expectation = Reference.open(tiny_untied, [beside])
    assert all(result.passed for result in check_lora(out, expectation, every=True))
    data = bytearray(out.read_bytes())
    place = GgufFile.open(out).tensors[tensor].offset_bytes
    value = np.frombuffer(data, "<f4", 1, place) * np.float32(1.01)
    data[place : place + 4] = value.astype("<f4").tobytes()
    out.write_bytes(data)
    assert [result.name for result in check_lora(out, expectation, every=False) if not result.passed] == [check]
