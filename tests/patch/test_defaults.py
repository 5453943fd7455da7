"""Adapters as PEFT saves them by default once a vocabulary was resized: the whole matrix lies beside the rows."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporter.cli.main import run
from fixtures import adapters, tiny
from fixtures.peft_adapters import perturb
from tests.support.trained import NEW_TOKENS

Capture = pytest.CaptureFixture[str]
WEIGHTS = "adapter_model.safetensors"
#: An adapter of each kind → the base that it is for.
BASES = {
    "tied": "tied",
    "untied": "untied",
    "tied, partly": "tied",
    "untied, partly": "untied",
    "tied, padded": "tied",
    "untied, padded": "untied",
}


def succeed(*arguments: object) -> None:
    assert run([*map(str, arguments), "-q"]) == 0


def assert_same(got: Path, want: Path) -> None:
    assert files(got) == files(want)


def files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def edited(adapter: Path, out: Path, key: str, row: int | slice, value: float = 7.0) -> Path:
    """A copy of an adapter: tensors with names that end in ``key`` get another row, or keep only some rows."""
    shutil.copytree(adapter, out)
    tensors = load_file(out / WEIGHTS)
    for name in [name for name in tensors if name.endswith(key)]:
        tensors[name] = tensors[name][row] if isinstance(row, slice) else tensors[name].clone()
        if isinstance(row, int):
            tensors[name][row] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / WEIGHTS, {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows of 256, so that every quantisation of ggml fits."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny.build_llama(folder / name, hidden=256, tied=name == "tied") for name in ("tied", "untied")}


@pytest.fixture(scope="module")
def saved(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters with new tokens, saved with PEFT's defaults.

    "partly": new rows stay as resizing made them. "padded": the matrix has rows to a multiple of 64 behind the tokens.
    """
    folder = tmp_path_factory.mktemp("adapters")
    made = {
        "tied": stock(bases["tied"], folder / "tied", (300, 512, 513, 514)),
        "untied": stock(bases["untied"], folder / "untied", (300, 512, 513, 514), adapters.HEAD_AND_EMBEDDING),
        "tied, partly": stock(bases["tied"], folder / "tied-partly", (300, 513)),
        "untied, partly": stock(bases["untied"], folder / "untied-partly", (5, 514), adapters.HEAD_AND_EMBEDDING),
    }
    for name, base in BASES.items():
        if name.endswith("padded"):
            targets = None if base == "tied" else adapters.HEAD_AND_EMBEDDING
            made[name] = stock(bases[base], folder / name, (300, 512, 514), targets, multiple=64)
    for name, adapter in made.items():
        shape = (576 if name.endswith("padded") else 515, 256)
        assert any(value.shape == shape for value in load_file(adapter / WEIGHTS).values()), "PEFT saved the matrix"
    return made


def stock(
    base: Path, out: Path, ids: Sequence[int], targets: Sequence[str] | None = None, multiple: int | None = None
) -> Path:
    """``NEW_TOKENS`` are added, the matrices padded to a ``multiple``, and the rows ``ids`` trained."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(NEW_TOKENS))
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it saves the resized embedding
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple, mean_resizing=False)
        config = TrainableTokensConfig(token_indices=list(ids), target_modules=list(targets) if targets else None)
        tuned: Any = get_peft_model(model, config)
        perturb(tuned, 0)
        tuned.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("name", BASES)
def test_a_gguf_is_patched_to_what_merging_anew_gives(
    bases: dict[str, Path], saved: dict[str, Path], tmp_path: Path, name: str, quant: str
) -> None:
    options = ["--to", "gguf", "--quant", quant]
    succeed("export", bases[BASES[name]], *options, "-o", tmp_path / "base.gguf")
    succeed("merge", saved[name], *options, "-o", tmp_path / "want.gguf")
    succeed("patch", tmp_path / "base.gguf", saved[name], "--verify", "weights", "-o", tmp_path / "got.gguf")
    assert_same(tmp_path / "got.gguf", tmp_path / "want.gguf")


@pytest.mark.parametrize("name", BASES)
def test_onnx_models_are_patched_to_what_merging_anew_gives(
    bases: dict[str, Path], saved: dict[str, Path], tmp_path: Path, name: str
) -> None:
    options = ["--to", "onnx", "--quant", "fp32", "--quant", "int4", "--verify", "off"]
    succeed("export", bases[BASES[name]], *options, "-o", tmp_path / "base")
    succeed("merge", saved[name], *options, "-o", tmp_path / "want")
    succeed("patch", tmp_path / "base", saved[name], "--verify", "weights", "-o", tmp_path / "got")
    assert_same(tmp_path / "got", tmp_path / "want")


@pytest.mark.parametrize("row", [0, 511])
def test_a_matrix_with_another_row_than_the_base_is_no_resized_one(
    bases: dict[str, Path], saved: dict[str, Path], tmp_path: Path, capsys: Capture, row: int
) -> None:
    succeed("export", bases["untied"], "--to", "gguf", "-o", tmp_path / "base.gguf")
    other = edited(saved["untied"], tmp_path / "other", "embed_tokens.base_layer.weight", row)
    assert_refused(capsys, 5, f"row {row} of this whole matrix differs from {bases['untied']}", tmp_path, other)
    succeed("patch", tmp_path / "base.gguf", saved["untied"], "-o", tmp_path / "ok.gguf")


def test_a_matrix_that_is_no_resized_one_by_its_shape(
    bases: dict[str, Path], saved: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    succeed("export", bases["tied"], "--to", "gguf", "-o", tmp_path / "base.gguf")
    short = edited(saved["tied"], tmp_path / "short", "base_layer.weight", slice(0, 500))
    assert_refused(capsys, 4, "expected at least 512 rows of width 256", tmp_path, short)


def test_a_resized_matrix_with_a_broken_new_row(
    bases: dict[str, Path], saved: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    succeed("export", bases["tied"], "--to", "gguf", "-o", tmp_path / "base.gguf")
    broken = edited(saved["tied, partly"], tmp_path / "broken", "base_layer.weight", 514, float("nan"))
    assert_refused(capsys, 4, "expected finite values, found NaN or Inf in row 514", tmp_path, broken)


@pytest.mark.parametrize(("fmt", "suffix"), [("gguf", ".gguf"), ("onnx", "")])
def test_padding_needs_no_token_but_a_trained_row_does(
    bases: dict[str, Path], tmp_path: Path, capsys: Capture, fmt: str, suffix: str
) -> None:
    adapter = stock(bases["tied"], tmp_path / "adapter", (512, 540), multiple=64)
    base, out = tmp_path / f"base{suffix}", tmp_path / f"refused{suffix}"
    succeed("export", bases["tied"], "--to", fmt, "--verify", "off", "-o", base)
    assert run(["patch", str(base), str(adapter), "-o", str(out)]) == 4
    assert "expected token ids below 515" in (printed := capsys.readouterr().err)
    assert "found 540" in printed
    assert not out.exists()


def test_without_a_base_a_resized_matrix_cannot_be_distinguished_from_a_trained_one(
    bases: dict[str, Path], saved: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    succeed("export", bases["tied"], "--to", "gguf", "-o", tmp_path / "base.gguf")
    message = "use --base CHECKPOINT in place of --trust-base, or save the adapter with PEFT's save_pretrained(…, save_"
    assert_refused(capsys, 5, message, tmp_path, saved["tied"], "--trust-base")


@pytest.mark.parametrize("alike", [True, False])
def test_two_adapters_may_share_one_resized_matrix_and_no_other(
    bases: dict[str, Path], saved: dict[str, Path], tmp_path: Path, capsys: Capture, *, alike: bool
) -> None:
    succeed("export", bases["tied"], "--to", "gguf", "-o", tmp_path / "base.gguf")
    first, second = saved["tied, partly"], stock(bases["tied"], tmp_path / "other", (7, 512))
    if not alike:
        second = edited(second, tmp_path / "differs", "base_layer.weight", 514)
        return assert_refused(
            capsys, 4, "expected a single resized embedding, found different values in", tmp_path, first, second
        )
    succeed("merge", first, second, "--to", "gguf", "-o", tmp_path / "want.gguf")
    succeed("patch", tmp_path / "base.gguf", first, second, "-o", tmp_path / "got.gguf")
    assert_same(tmp_path / "got.gguf", tmp_path / "want.gguf")


def test_a_base_of_float32_is_compared_with_a_matrix_of_16_bits_by_values(tmp_path: Path, capsys: Capture) -> None:
    """A model in bfloat16 rounds the base that it was read from: its matrix is another one, as it is for a merge."""
    base = tiny.build_llama(tmp_path / "base", hidden=256)
    weights = load_file(base / "model.safetensors")
    exact = {name: value.float() for name, value in weights.items()}
    adapter = stock(base, tmp_path / "adapter", (512, 513, 514))
    for number, tensors in enumerate((exact, {name: value * 1.0001 for name, value in exact.items()})):
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        succeed("export", base, "--to", "gguf", "-o", tmp_path / "base.gguf", "--force")
        if number:
            return assert_refused(capsys, 5, "row 0 of this whole matrix differs from", tmp_path, adapter)
        succeed("merge", adapter, "--to", "gguf", "-o", tmp_path / "want.gguf")
        succeed("patch", tmp_path / "base.gguf", adapter, "-o", tmp_path / "got.gguf")
        assert_same(tmp_path / "got.gguf", tmp_path / "want.gguf")


def assert_refused(capsys: Capture, code: int, message: str, folder: Path, *arguments: object) -> None:
    capsys.readouterr()
    out = folder / "refused.gguf"
    assert run(["patch", str(folder / "base.gguf"), *map(str, arguments), "-o", str(out)]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not out.exists()
