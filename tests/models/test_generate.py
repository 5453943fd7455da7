"""The generated data are what the installed transformers says; all of them are compared by ``make models``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from exporter.models import generate
from exporter.models.data import CLASSES, CONVERSIONS, FOLDER
from exporter.models.facts import transformers_version
from exporter.models.generate_class import describe_class, text_classes

#: Classes with a plain head, a tie, a bias of the head, stacked experts, nested models and no head.
CLASS_NAMES = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "mixtral": "MixtralModel",
    "gpt_oss": "GptOssForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
}
FILES: dict[str, dict[str, Any]] = {"llama.json": {"tasks": {}}, CONVERSIONS: {"conversions": {}}}


def data(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_the_data_are_those_of_the_installed_transformers() -> None:
    assert transformers_version() == transformers.__version__


def test_the_conversions_are_those_of_transformers() -> None:
    assert data(CONVERSIONS)["conversions"] == plain(generate.conversions())


def test_the_tasks_of_every_type_are_those_of_transformers() -> None:
    types = text_classes()
    assert data(CONVERSIONS)["bases"] == {name: entry["base"] for name, entry in types.items() if entry["base"]}
    listed = [path.stem for path in Path(FOLDER).glob("*.json") if path.name not in (CONVERSIONS, CLASSES)]
    assert {name: data(f"{name}.json")["tasks"] for name in listed} == {name: types[name]["tasks"] for name in listed}


@pytest.mark.parametrize("model_type", CLASS_NAMES)
def test_the_facts_about_a_class_are_those_of_transformers(
    model_type: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    name = CLASS_NAMES[model_type]
    _, facts, error = describe_class(name)
    assert error == ""
    assert plain(facts) == data(f"{model_type}.json")["classes"][name]
    assert data(CLASSES)[name] == model_type
    assert capfd.readouterr() == ("", "")
    assert not recwarn


def test_a_class_that_its_default_config_cannot_build_has_the_error() -> None:
    _, facts, error = describe_class("LlamaConfig")
    assert facts is None
    assert error.startswith("AttributeError: ")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder that is written to, and two files as what transformers says."""

    def contents() -> Iterator[tuple[str, dict[str, Any]]]:
        yield from FILES.items()

    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    monkeypatch.setattr(generate, "generate", contents)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_the_command_writes_what_differs_and_removes_what_is_gone(folder: Path) -> None:
    (folder / "gone.json").write_text("{}")
    assert generate.main([]) == 0
    assert {path.name: json.loads(path.read_text()) for path in folder.iterdir()} == FILES
    assert generate.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("name", "text"), [("llama.json", "{}"), ("gone.json", "{}"), (CONVERSIONS, "")], ids=["other", "gone", "empty"]
)
def test_the_check_names_a_file_that_differs(
    name: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate.main([])
    (folder / name).write_text(text)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err == f"{name}: differs from transformers; run python -m exporter.models.generate\n"
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
