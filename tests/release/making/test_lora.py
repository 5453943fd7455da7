"""``[gguf-lora]``: the adapter alone, in a release beside the merged model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from exporter.cli.main import run
from exporter.release import plan_release, read_spec
from tests.formats.gguf import runtime
from tests.formats.gguf.test_llama_cpp import mean_kl, reference
from tests.release.projects import Project, contents, methods
from tests.support.documents import read_report

FORMATS = '[gguf]\ntypes = ["f32"]\n[gguf-lora]\n'
FULL = '[verify]\nlevel = "full"\n'
LORA = "gguf-lora/Lamp-140K-F32-LoRA.gguf"
IDS = [1, 300, 40, 17, 9, 2, 61, 300]

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def untied(tiny_untied: Path, tiny_untied_adapter: Path, tmp_path: Path) -> Project:
    """A base with a head of its own, and a row adapter ``one``."""
    home = tmp_path / "project"
    shutil.copytree(tiny_untied, home / "base")
    shutil.copytree(tiny_untied_adapter, home / "one")
    return Project(home)


def test_the_lora_is_that_of_a_merge_and_lies_beside_the_merged_model(untied: Project, tmp_path: Path) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged.gguf"
    assert untied.write("one", formats=FORMATS).release(out) == 0
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.gguf")) == [
        LORA,
        "gguf/Lamp-140K-F32.gguf",
    ]
    words = ["merge", untied.folder / "one", "--base", untied.folder / "base", "--to", "gguf-lora", "-o", merged, "-q"]
    assert run(list(map(str, words))) == 0
    assert (out / LORA).read_bytes() == merged.read_bytes()
    assert methods(out) == {"gguf-f32": "converted, patched", "gguf-lora": "merged"}
    assert run(["verify", str(out), "-q"]) == 0


def test_pieces_of_both_formats_are_joined(untied: Project, tmp_path: Path) -> None:
    untied.write("one", formats=FORMATS)
    for job in ("gguf-f32", "gguf-lora"):
        assert untied.release(tmp_path / "pieces" / job, "--only", job) == 0
    assert untied.release(tmp_path / "joined", "--assemble", tmp_path / "pieces") == 0
    assert untied.release(tmp_path / "out") == 0
    assert contents(tmp_path / "joined") == contents(tmp_path / "out")


@pytest.mark.slow
def test_a_full_verification_runs_the_model_and_compares_every_row_of_the_lora(untied: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert untied.write("one", formats=FORMATS, verify=FULL).release(out) == 0
    reports = {report["format"]: report for report in read_report(out)["artifacts"]}
    assert reports["gguf"]["facts"]["runtime"] == "llama.cpp"
    assert [skip["name"] for skip in reports["gguf-lora"]["skipped"]] == ["logits"]
    assert "A LoRA file was not run but compared value by value" in (out / "README.md").read_text()
    want = reference(untied.folder / "base", untied.folder / "one", IDS)
    base = tmp_path / "base.gguf"
    words = ["export", str(untied.folder / "base"), "--to", "gguf", "--quant", "F32", "-o", str(base), "-q"]
    assert run(words) == 0
    assert mean_kl(want, runtime.logits(base, IDS, lora=out / LORA)) <= 1e-6, "as the card says"


def test_the_documents_know_a_lora_from_a_model(untied: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert untied.write("one", formats=FORMATS).release(out) == 0
    page = (out / "README.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("### ")] == [
        "### llama.cpp",
        "### Ollama",
        "### llama.cpp with LoRA",
    ]
    assert f"llama-cli -m BASE.gguf --lora {LORA} -p" in page
    assert ModelCard.load(out / "README.md").data.tags == ["ttexport", "gguf", "lora"]
    froms = [line for line in (out / "Modelfile").read_text().splitlines() if "FROM" in line]
    assert froms == ["FROM ./gguf/Lamp-140K-F32.gguf"]


def test_a_release_of_the_lora_alone_has_no_modelfile(untied: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert untied.write("one", formats="[gguf-lora]\n").release(out) == 0
    assert not (out / "Modelfile").exists()
    assert ModelCard.load(out / "README.md").data.library_name == "gguf"
    assert run(["verify", str(out), "-q"]) == 0


def test_two_models_have_a_lora_each(untied: Project, tiny_both_adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_both_adapter, untied.folder / "two")
    plan = plan_release(read_spec(untied.write("one", "two", formats="[gguf-lora]\n").toml))
    assert [plan.place(job) for job in plan.jobs] == [
        "one/gguf-lora/Lamp-140K-one-F32-LoRA.gguf",
        "two/gguf-lora/Lamp-140K-two-F32-LoRA.gguf",
    ]


def test_a_tied_base_is_refused_before_anything_is_made(project: Project, tmp_path: Path, capsys: Capture) -> None:
    assert project.write("one", formats=FORMATS).release(tmp_path / "out") == 5
    assert "tied" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["project"]
