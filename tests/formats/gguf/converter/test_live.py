"""llama.cpp's own converter, run by ttexport on overlays of tiny models."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.formats.gguf.converter.plan import plan_converter, write_converted
from exporter.formats.hf.write import plan_hf, write_hf
from exporter.merge.plan import plan_merge
from exporter.sources.gguf.file import GgufFile
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from fixtures.zoo import build, rows_adapter
from tests.conformance.gguf import convert, required_converter
from tests.formats.gguf.converter.overlays import script_for_tiny_tokenizers
from tests.support.chat_templates import LAYOUTS, folders

pytestmark = pytest.mark.converter
Capture = pytest.CaptureFixture[str]


def test_an_overlay_gives_the_bytes_of_the_merged_checkpoint(
    tiny_untied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    root = required_converter()
    base = tmp_path / "lamp"
    write_hf(plan_hf(plan_merge(Checkpoint.open(tiny_untied), []).model(), 40_000), base)
    merge = plan_merge(Checkpoint.open(base), [Adapter.open(tiny_adapter)])
    merged = tmp_path / "merged" / "lamp"
    merged.parent.mkdir()
    write_hf(plan_hf(merge.model()), merged)
    convert(root, merged, tmp_path / "want.gguf", "bf16", "smollm")
    layout = plan_converter(merge, script_for_tiny_tokenizers(root, tmp_path / "converter").parent, "BF16")
    write_converted(layout, tmp_path / "got.gguf")
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()
    size = (tmp_path / "got.gguf").stat().st_size
    assert 0.9 * size < layout.nbytes < 1.1 * size


def test_the_converter_writes_the_templates_of_transformers(
    tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    case = "named without default and text in the config"
    script = script_for_tiny_tokenizers(required_converter(), tmp_path / "converter")
    base, adapter = folders(case, tiny_tied, tiny_adapter, tmp_path)
    argv = ["merge", str(adapter), "--base", str(base), "--to", "gguf", "--converter", str(script)]
    assert run([*argv, "-o", str(tmp_path / "out.gguf"), "--verify", "weights", "-q"]) == 0
    stored = GgufFile.open(tmp_path / "out.gguf").metadata
    wanted = {name.replace(" ", "_"): text for name, text in LAYOUTS[case][2].items()}
    assert stored.get("tokenizer.chat_template") == wanted.get("default")
    assert stored.get("tokenizer.chat_template.tool_use") == wanted.get("tool_use")


def test_a_model_without_a_family_is_made_by_the_installed_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Qwen3-Next as transformers saves it: without the prediction layer that the converter expects by default."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "ttexport" / "converter" / version("llama-cpp-python")
    script_for_tiny_tokenizers(required_converter(), place)
    base = build("qwen3_next", tmp_path / "base")
    adapter = rows_adapter(base, tmp_path / "adapter")
    argv = ["merge", str(adapter), "--base", str(base), "--to", "gguf", "--quant", "f32", "-o"]
    assert run([*argv, str(tmp_path / "out.gguf"), "--verify", "weights", "--json"]) == 0
    (artifact,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert artifact["verification"]["passed"]
    assert any("runs with --no-mtp" in note for note in artifact["notes"])
    assert GgufFile.open(tmp_path / "out.gguf").metadata["general.architecture"] == "qwen3next"
