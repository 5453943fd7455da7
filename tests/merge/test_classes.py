"""Adapters of one class of a model type merge into checkpoints of another class of the same type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from exporter.cli.main import run
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from exporter.sources.places import place_of, use_of
from fixtures import zoo
from fixtures.peft_adapters import perturb
from fixtures.zoo.build import load

WEIGHTS = "adapter_model.safetensors"


def adapter(model: Any, folder: Path, task: str, **options: Any) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task, **options)
    tuned = get_peft_model(model, config)
    perturb(tuned, seed=0)
    tuned.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("mistral", tmp_path_factory.mktemp("zoo") / "mistral")


@pytest.fixture(scope="module")
def headless(causal: Path) -> Path:
    folder = causal.with_name("headless")
    load(causal).model.save_pretrained(folder)
    return folder


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model.eval()(input_ids=torch.arange(5, 23).reshape(2, 9))[0]
    return values


def test_an_adapter_of_the_headless_model_fits_both_checkpoints(causal: Path, headless: Path, tmp_path: Path) -> None:
    rows = {"trainable_token_indices": [3, 7]}
    tuned = adapter(AutoModel.from_pretrained(headless), tmp_path / "adapter", "FEATURE_EXTRACTION", **rows)
    wanted = outputs(PeftModel.from_pretrained(AutoModel.from_pretrained(headless), tuned))
    for base in (headless, causal):
        out = tmp_path / base.name
        assert run(["merge", str(tuned), "--base", str(base), "-o", str(out), "-q"]) == 0
        assert torch.allclose(outputs(AutoModel.from_pretrained(out)), wanted, atol=1e-5 * float(wanted.abs().max()))


def test_a_causal_adapter_fits_the_headless_checkpoint(causal: Path, headless: Path, tmp_path: Path) -> None:
    tuned = adapter(load(causal), tmp_path / "adapter", "CAUSAL_LM")
    assert run(["merge", str(tuned), "--base", str(headless), "-o", str(tmp_path / "out"), "-q"]) == 0
    merged = PeftModel.from_pretrained(load(causal), tuned).merge_and_unload()
    wanted = outputs(merged.model)
    given = outputs(AutoModel.from_pretrained(tmp_path / "out"))
    assert torch.allclose(given, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_a_classifier_trained_on_a_causal_base_names_the_class_to_save(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=3)
    tuned = adapter(model, tmp_path / "adapter", "SEQ_CLS")
    assert run(["merge", str(tuned), "--base", str(causal), "-o", str(tmp_path / "out")]) == 5
    line = capsys.readouterr().err
    assert "'score', the head of MistralForSequenceClassification, but the base is" in line
    assert "MistralForSequenceClassification.from_pretrained(base, num_labels=3)" in line
    classifier = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    assert run(["merge", str(tuned), "--base", str(tmp_path / "classifier"), "-o", str(tmp_path / "out"), "-q"]) == 0
    wanted = outputs(PeftModel.from_pretrained(classifier, tuned))
    given = outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"))
    assert torch.allclose(given, wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "llava", "qwen3_5", "smolvlm"])
def test_prefixes_of_vision_language_models_mean_the_same_tensors(name: str, tmp_path: Path) -> None:
    base = zoo.build(name, tmp_path / "base")
    checkpoint = Checkpoint.open(base)
    edits = Adapter.open(zoo.rows_adapter(base, tmp_path / "rows")).edits
    path = next(edit.module for edit in edits if edit.module.endswith("embed_tokens"))
    text = "text_model" if ".text_model." in path else "language_model"
    layer = path.replace("embed_tokens", "layers.1.mlp.gate_proj")
    for old, new in ((f"model.{text}.", f"{text}.model."), (f"{text}.", ""), (f"model.{text}.", "")):
        assert use_of(checkpoint, path.replace(old, new)) == use_of(checkpoint, path) == "embedding"
        renamed = place_of(checkpoint, layer.replace(old, new), "weight")
        wanted = place_of(checkpoint, layer, "weight")
        assert renamed is not None
        assert wanted is not None
        assert renamed.name == wanted.name is not None


def test_an_adapter_with_the_names_of_the_first_release_gives_the_same_checkpoint(tmp_path: Path) -> None:
    base = zoo.build("llava", tmp_path / "base")
    tuned = zoo.rows_adapter(base, tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    for file in tuned.iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tuned / WEIGHTS)
    save_file(
        {key.replace("model.language_model.", "language_model.model."): tensors[key] for key in tensors}, old / WEIGHTS
    )
    for folder in (tuned, old):
        assert run(["merge", str(folder), "--base", str(base), "-o", str(tmp_path / f"out-{folder.name}"), "-q"]) == 0
    first, second = (load_file(tmp_path / f"out-{folder.name}" / "model.safetensors") for folder in (tuned, old))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_updates_of_a_block_that_several_layers_share_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = zoo.build("zamba", tmp_path / "base")
    tuned = zoo.lora_adapter(base, tmp_path / "adapter")
    assert run(["merge", str(tuned), "--base", str(base), "-o", str(tmp_path / "out")]) == 5
    assert "several layers of the base share the stored tensor" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "recipe", "reason"),
    [
        ("fsmt", zoo.lora_adapter, "embedding and head have separate vocabularies"),
        ("moshi", zoo.lora_adapter, "computes the number of embedding rows from other settings"),
        ("molmo2", zoo.rows_adapter, "stores the input embedding in several tensors"),
    ],
)
def test_a_vocabulary_that_cannot_be_stored_is_refused_with_the_cause(
    name: str, recipe: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = zoo.build(name, tmp_path / "base")
    tuned = recipe(base, tmp_path / "adapter")
    capsys.readouterr()
    assert run(["merge", str(tuned), "--base", str(base), "-o", str(tmp_path / "out")]) == 5
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
