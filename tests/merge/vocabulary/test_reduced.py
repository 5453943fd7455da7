"""Adapters of a vocabulary that was reduced to the tokenizer's size before training, as many training scripts do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile
from exporter.sources.hf.checkpoint import Checkpoint
from fixtures import zoo
from fixtures.peft_adapters import perturb
from fixtures.tiny import build_llama

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS, PADDING, TRAINED = 512, 8, [5, 9, 17]
KINDS: dict[str, PeftConfig] = {
    "rows": TrainableTokensConfig(token_indices=TRAINED),
    "LoRA and rows": LoraConfig(target_modules=["q_proj"], trainable_token_indices=TRAINED),
    "LoRA and rows by name": LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TRAINED}),
}


def build(folder: Path, *, tied: bool) -> Path:
    base = folder / "base"
    build_llama(base, tied=tied, padding_rows=PADDING, dtype="float32")
    assert Checkpoint.open(base).tensors["model.embed_tokens.weight"].spec.n_rows == TOKENS + PADDING
    return base


def reduced(base: Path, new: int) -> tuple[Any, Any]:
    """The base with ``new`` added tokens, resized to the size of the tokenizer; and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{number}>" for number in range(new)])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer


def adapter(base: Path, folder: Path, kind: str, new: int) -> Path:
    model, tokenizer = reduced(base, new)
    tuned = get_peft_model(model, copy.deepcopy(KINDS[kind]))
    perturb(tuned, seed=0)
    tuned.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model.eval()(input_ids=torch.tensor([[5, 9, 17, 30, 31]])).logits
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_merged_model_has_the_reduced_vocabulary_as_in_peft(
    tied: bool, new: int, kind: str, tmp_path: Path
) -> None:
    base = build(tmp_path, tied=tied)
    tuned = adapter(base, tmp_path / "adapter", kind, new)
    # The bound of level full is absolute, and the logits of this model with a random LoRA are larger than those of real
    # models.
    level = "full" if kind == "rows" else "weights"
    words = ["merge", str(tuned), "--base", str(base), "--verify", level, "-o", str(tmp_path / "out")]
    assert run([*words, "-q"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == TOKENS + new
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    want = logits(PeftModel.from_pretrained(reduced(base, new)[0], tuned))
    assert got.shape == want.shape == (1, 5, TOKENS + new)
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_patched_gguf_keeps_the_other_rows_of_the_base(tied: bool, new: int, tmp_path: Path) -> None:
    base = build(tmp_path, tied=tied)
    tuned = adapter(base, tmp_path / "adapter", "rows", new)
    assert run(["export", str(base), "--to", "gguf", "-o", str(tmp_path / "base.gguf"), "-q"]) == 0
    words = ["patch", str(tmp_path / "base.gguf"), str(tuned), "-o", str(tmp_path / "out.gguf")]
    assert run([*words, "--verify", "weights", "-q"]) == 0
    assert (
        run(["merge", str(tuned), "--base", str(base), "--to", "gguf", "-o", str(tmp_path / "merged.gguf"), "-q"]) == 0
    )
    before, patched, merged = (GgufFile.open(tmp_path / f"{name}.gguf") for name in ("base", "out", "merged"))
    name, size = "token_embd.weight", TOKENS + new
    assert merged.tensors[name].n_rows == size
    assert patched.tensors[name].n_rows == TOKENS + PADDING
    assert (patched.rows(name, 0, size) == merged.rows(name, 0, size)).all()
    assert (patched.rows(name, size, TOKENS + PADDING) == before.rows(name, size, TOKENS + PADDING)).all()


def test_rows_of_a_reduced_matrix_that_differ_from_the_base_are_not_patched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = build(tmp_path, tied=True), tmp_path / "other"
    build_llama(other, tied=True, padding_rows=PADDING, dtype="float32", seed=1)
    tuned = adapter(other, tmp_path / "adapter", "rows", 0)
    assert run(["export", str(base), "--to", "gguf", "-o", str(tmp_path / "base.gguf"), "-q"]) == 0
    words = ["patch", str(tmp_path / "base.gguf"), str(tuned), "--base", str(base), "-o", str(tmp_path / "out.gguf")]
    assert run([*words, "-q"]) == 4
    assert "trained on a different base" in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_patched_artifact_that_keeps_the_rows_of_the_base_is_verified(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = build(tmp_path, tied=tied)
    tuned, out = adapter(base, tmp_path / "adapter", "rows", 0), tmp_path / "out.gguf"
    assert run(["export", str(base), "--to", "gguf", "-o", str(tmp_path / "base.gguf"), "-q"]) == 0
    patch = ["patch", str(tmp_path / "base.gguf"), str(tuned), "-q", "-o"]
    assert run([*patch, str(out)]) == 0
    verify = ["verify", str(out), "--reference", str(base), "--adapter", str(tuned), "-q", "--level"]
    assert run([*verify, "rows"]) == 0
    assert run([*verify, "weights"]) == 0
    capsys.readouterr()
    assert run([*patch, str(tmp_path / "full.gguf"), "--verify", "full"]) == 5
    assert "cannot be compared with those of an artifact that keeps the 520 rows" in capsys.readouterr().err
    assert not (tmp_path / "full.gguf").exists()
    tensor, data = GgufFile.open(out).tensors["token_embd.weight"], bytearray(out.read_bytes())
    data[tensor.offset_bytes + (TOKENS + 1) * tensor.row_nbytes + 1] ^= 1
    out.write_bytes(data)
    assert run([*verify, "weights"]) == 3


def test_a_token_without_a_row_in_the_reduced_matrix_is_refused_by_merge_and_patch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = build(tmp_path, tied=True)
    tuned = adapter(base, tmp_path / "adapter", "rows", 0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<lost>"])
    tokenizer.save_pretrained(tuned)
    assert run(["export", str(base), "--to", "gguf", "-o", str(tmp_path / "base.gguf"), "-q"]) == 0
    for words in (["merge", str(tuned), "--to", "gguf"], ["patch", str(tmp_path / "base.gguf"), str(tuned)]):
        assert run([*words, "-o", str(tmp_path / "out.gguf"), "-q"]) == 4
        assert "found 512 for the token '<lost>'" in capsys.readouterr().err
        assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("name", ["bert:mlm", "bert:mlm+untied"])
def test_the_bias_of_the_head_is_reduced_with_the_embedding(name: str, tmp_path: Path) -> None:
    base = zoo.build(name, tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).unlink()
    model = AutoModelForMaskedLM.from_pretrained(base)
    model.resize_token_embeddings(500, mean_resizing=False)
    tuned = get_peft_model(model, LoraConfig(target_modules=["query"], trainable_token_indices=[3, 4]))
    perturb(tuned, seed=0)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    words = ["merge", str(tmp_path / "adapter"), "--base", str(base), "-o", str(tmp_path / "out")]
    assert run([*words, "--verify", "weights", "-q"]) == 0
    want = tuned.merge_and_unload().state_dict()
    got = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").state_dict()
    assert got["cls.predictions.bias"].shape == (500,)
    assert all(torch.allclose(got[key], want[key], atol=1e-6) for key in got)
