"""What a model needs is known from the converter's source code before the converter runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exporter.errors import BadInput, MissingDependency, NotExpressible, UnreadableFile
from exporter.formats.gguf.converter import needs
from exporter.formats.gguf.converter.location import source_files
from exporter.formats.gguf.converter.needs import has_prediction_layers, required_arguments
from exporter.formats.gguf.converter.source import architectures, model_class, text_architecture
from exporter.merge.model import MergedModel
from exporter.merge.plan import plan_merge
from exporter.packages import Requirement
from exporter.sources.hf.checkpoint import Checkpoint
from tests.conformance.gguf import required_converter

MODULES = {"Plain": "plain", "Old": "plain", "New": "more", "Lost": "more"}
PACKAGE = {
    "__init__.py": f"TEXT_MODEL_MAP: dict[str, str] = {MODULES!r}\n",
    "base.py": "class TextModel:\n    supports_mtp_export: bool = False\n"
    "    def set_vocab(self): self._set_vocab_gpt2()\n",
    "plain.py": "from .base import TextModel, ModelBase\n"
    "@ModelBase.register('Plain')\nclass Plain(TextModel):\n    pass\n"
    "@ModelBase.register('Old')\nclass Old(TextModel):\n    def set_vocab(self):\n"
    "        self._set_vocab_sentencepiece()\n",
    "more.py": "from .plain import Plain\nfrom .base import ModelBase\n"
    "class Mixin:\n    supports_mtp_export = True\n"
    "@ModelBase.register('Newer', 'New')\nclass New(Mixin, Plain):\n    def set_vocab(self):\n"
    "        if self.has_model: self._set_vocab_sentencepiece()\n",
}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "converter"
    (folder / "conversion").mkdir(parents=True)
    for name, text in PACKAGE.items():
        (folder / "conversion" / name).write_text(text)
    (folder / "convert_hf_to_gguf.py").write_text("")
    return folder / "convert_hf_to_gguf.py"


def model(base: Path, tmp_path: Path, architecture: str, *, tokenizer_model: bool = False) -> MergedModel:
    folder = Path(shutil.copytree(base, tmp_path / architecture))
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer_model:
        (folder / "tokenizer.model").write_bytes(b"pieces")
    return plan_merge(Checkpoint.open(folder), []).model()


def test_the_source_code_tells_what_a_class_does(script: Path) -> None:
    assert architectures(script) == MODULES
    facts = {name: model_class(script, name) for name in ("Plain", "Old", "New", "Lost", "None")}
    assert {name: row and tuple(vars(row).values()) for name, row in facts.items()} == {
        "Plain": (False, False, False),
        "Old": (False, True, True),
        "New": (True, True, False),
        "Lost": None,
        "None": None,
    }
    assert source_files(script.parent) == source_files(script)
    assert "conversion/more.py" in source_files(script)


def test_a_script_without_the_package_tells_nothing(tmp_path: Path, tiny_tied: Path) -> None:
    (tmp_path / "convert.py").write_text("")
    assert architectures(tmp_path / "convert.py") is None
    assert required_arguments(tmp_path / "convert.py", model(tiny_tied, tmp_path, "Any"), []) == ()


def test_damaged_source_code_is_named(script: Path) -> None:
    (script.parent / "conversion" / "plain.py").write_text("class :")
    with pytest.raises(UnreadableFile, match=r"plain\.py: expected Python source code"):
        model_class(script, "Plain")


def test_an_architecture_that_the_converter_does_not_know_is_refused(
    script: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    with pytest.raises(NotExpressible, match="does not support the architecture Other"):
        required_arguments(script, model(tiny_tied, tmp_path, "Other"), [])


def test_a_missing_file_of_the_tokenizer_is_said_before(script: Path, tiny_tied: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.model: expected the file, which .* needs for Old"):
        required_arguments(script, model(tiny_tied, tmp_path, "Old"), [])


def test_a_missing_package_is_said_before(
    script: Path, tiny_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "_SENTENCEPIECE", Requirement(("no_such_module",), "sentencepiece", "sentencepiece"))
    plain = model(tiny_tied, tmp_path, "Plain", tokenizer_model=True)
    assert required_arguments(script, plain, []) == ()
    with pytest.raises(MissingDependency, match="needs sentencepiece; run pip install 'sentencepiece'"):
        required_arguments(script, model(tiny_tied, tmp_path, "Old", tokenizer_model=True), [])
    monkeypatch.setattr(needs, "_PACKAGES", Requirement(("no_such_module",), "torch", "ttexport"))
    with pytest.raises(MissingDependency, match="needs torch"):
        required_arguments(script, plain, [])


def test_a_model_without_its_prediction_layers_is_converted_without_them(
    script: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    made = model(tiny_tied, tmp_path, "New")
    assert required_arguments(script, made, []) == ("--no-mtp",)
    assert required_arguments(script, made, ["--no-nextn"]) == ()
    assert required_arguments(script, model(tiny_tied, tmp_path, "Plain"), []) == ()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("mtp.fc.weight", True),
        ("model.mtp.embed_tokens.weight", True),
        ("model.mtp_block.0.q.weight", True),
        ("model.layers.4.shared_head.norm.weight", True),
        ("model.layers.3.mlp.up_proj.weight", False),
        ("model.attempt.weight", False),
    ],
)
def test_prediction_layers_are_recognised_by_their_names(name: str, answer: bool) -> None:
    assert has_prediction_layers({"num_hidden_layers": 4}, ["model.norm.weight", name]) is answer
    assert has_prediction_layers({"text_config": {"num_hidden_layers": 4}}, [name]) is answer


def test_the_architecture_is_the_text_models() -> None:
    assert text_architecture({"architectures": ["A"], "text_config": {"architectures": ["B"]}}) == "B"
    assert text_architecture({"architectures": ["A"], "text_config": {"architectures": None}}) == "A"
    assert text_architecture({"architectures": []}) is None


@pytest.mark.converter
def test_every_architecture_of_llama_cpps_converter_has_a_class() -> None:
    script = required_converter() / "convert_hf_to_gguf.py"
    known = architectures(script)
    assert known is not None
    assert len(known) > 200
    facts = {name: model_class(script, name) for name in known}
    assert [name for name, row in facts.items() if row is None] == []
    skipping = {name for name, row in facts.items() if row and row.skips_prediction_layers}
    assert {"Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"} <= skipping
    assert "LlamaForCausalLM" not in skipping
    needing = {name for name, row in facts.items() if row and row.needs_sentencepiece}
    assert {"NemotronForCausalLM", "BaichuanForCausalLM"} <= needing
