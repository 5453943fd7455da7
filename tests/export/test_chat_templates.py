"""Chat templates in every place where transformers looks, in base and adapter: each format has the same ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile
from tests.support.chat_templates import (
    CHAT,
    JINJA,
    LAYOUTS,
    NAMED,
    SETTING,
    A,
    B,
    by_llama_cpp,
    by_transformers,
    folders,
    stored,
)


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_format_has_the_templates_of_transformers(
    case: str, tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra: llamacpp)")
    import transformers

    base, adapter = folders(case, tiny_tied, tiny_adapter, tmp_path)
    wanted = LAYOUTS[case][2]
    out = tmp_path / "out"
    argv = ["merge", str(adapter), "--base", str(base), "--to", "hf", "--to", "gguf", "--to", "onnx", "-o", str(out)]
    assert run([*argv, "--verify", "weights", "-q"]) == 0
    (gguf,) = out.rglob("*.gguf")
    (onnx,) = (path.parents[1] for path in out.rglob("model.onnx"))
    (hf,) = (path.parent for path in out.rglob("model.safetensors"))
    assert by_transformers(hf) == by_transformers(onnx) == wanted
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    rendered = {
        name.replace(" ", "_"): tokenizer.apply_chat_template(
            CHAT, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        for name, template in wanted.items()
    }
    assert by_llama_cpp(gguf) == rendered
    setting = json.loads((onnx / SETTING).read_text()).get("chat_template")
    as_dict = {entry["name"]: entry["template"] for entry in setting} if isinstance(setting, list) else setting
    assert as_dict in (wanted, wanted.get("default")), "transformers.js reads only this file"
    assert ((onnx / JINJA).exists() and (onnx / JINJA).read_text()) == wanted.get("default", False), "genai reads this"


@pytest.mark.parametrize("other", [A + " ", ""])
def test_another_template_is_found_at_every_level(
    other: str, tiny_tied: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = folders("named without default", tiny_tied, tiny_adapter, tmp_path)
    out = tmp_path / "model.gguf"
    stored(base, {NAMED: other} if other else {})
    argv = ["merge", str(adapter), "--base", str(base), "--to", "gguf", "-o", str(out)]
    assert run([*argv, "--verify", "off", "-q"]) == 0
    stored(base, {NAMED: A})
    for level in ("rows", "weights"):
        argv = ["verify", str(out), "--reference", str(base), "--adapter", str(adapter), "--level", level]
        assert run(argv) == 3
        assert "chat template tool_use: expected the template of the tuned model" in capsys.readouterr().err


def test_a_folder_of_templates_without_a_default_passes_in_full(
    tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra: llamacpp)")
    base, adapter = folders("text in the base's config, named in the adapter", tiny_tied, tiny_adapter, tmp_path)
    argv = ["merge", str(adapter), "--base", str(base), "--to", "gguf", "-o", str(tmp_path / "model.gguf")]
    assert run([*argv, "--dtype", "f32", "--verify", "full", "-q"]) == 0
    assert "tokenizer.chat_template" not in GgufFile.open(tmp_path / "model.gguf").metadata


def test_names_that_become_one_name_in_a_gguf_are_refused(
    tiny_tied: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = stored(Path(shutil.copytree(tiny_tied, tmp_path / "base")), {SETTING: {"tool use": A, "tool_use": B}})
    argv = ["export", str(base), "--to", "gguf", "-o", str(tmp_path / "model.gguf"), "-q"]
    assert run(argv) == 5
    assert "chat template 'tool_use': the name becomes 'tool_use'" in capsys.readouterr().err
