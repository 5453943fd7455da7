"""Keys of release.toml that reach their formats, the merge and the verification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.merge.passes import ReplaceRows
from exporter.sources.gguf.file import GgufFile
from tests.cli.test_converter import stand_in
from tests.release.projects import FORMATS, ROWS, Project, contents
from tests.support.documents import read_report

REPORT = f'{ROWS}report = "reports"\n'
REPORT_FILES = ["report.html", "report.json", "report.xml"]
#: Documents that hold the options of release.toml, or digests of such documents.
SPEC_FILES = {"manifest.json", "provenance.intoto.json", "SHA256SUMS"}

Capture = pytest.CaptureFixture[str]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def merged(project: Project, out: Path, *words: str) -> Path:
    """The same artifact by ``ttexport merge``."""
    inputs = [str(project.folder / "one"), "--base", str(project.folder / "base")]
    assert run(["merge", *inputs, *words, "-o", str(out), "-q"]) == 0
    return out


def tensors(path: Path) -> dict[str, bytes]:
    content = path.read_bytes()
    return {
        name: content[tensor.offset_bytes : tensor.offset_bytes + tensor.nbytes]
        for name, tensor in GgufFile.open(path).tensors.items()
    }


def test_a_report_of_one_model_is_written_to_its_folder(project: Project, tmp_path: Path) -> None:
    assert project.write("one", formats="[hf]\n", verify=REPORT).release(tmp_path / "out") == 0
    folder = project.folder / "reports"
    assert names(folder) == REPORT_FILES
    [report] = read_report(folder)["artifacts"]
    assert (report["artifact"], report["passed"]) == ("hf", True)
    assert "reports" not in names(tmp_path / "out")


def test_reports_of_several_models_have_a_folder_each(project: Project, tmp_path: Path) -> None:
    project.write("one", "two", formats='[hf]\n[gguf]\ntypes = ["bf16"]\n', verify=REPORT)
    assert project.release(tmp_path / "out") == 0
    assert names(project.folder / "reports") == ["one", "two"]
    for model in ("one", "two"):
        assert names(project.folder / "reports" / model) == REPORT_FILES
        reports = read_report(project.folder / "reports" / model)["artifacts"]
        assert [report["artifact"] for report in reports] == [
            f"{model}/hf",
            f"{model}/gguf/Lamp-107K-{model}-BF16.gguf",
        ]


def test_the_report_of_a_failed_verification_is_written(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReplaceRows, "apply", lambda self, start, value: value)
    assert project.write("one", formats="[hf]\n", verify=REPORT).release(tmp_path / "out") == 3
    assert names(project.folder / "reports") == REPORT_FILES
    assert not read_report(project.folder / "reports")["passed"]


def test_a_report_does_not_change_the_release(project: Project, undisturbed: Path, tmp_path: Path) -> None:
    assert project.write("one", "two", verify=REPORT).release(tmp_path / "out") == 0
    ours, theirs = contents(tmp_path / "out"), contents(undisturbed)
    assert {name for name in ours if ours[name] != theirs[name]} == SPEC_FILES
    assert ours.keys() == theirs.keys()


def test_weights_are_split_into_shards_of_the_given_size(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert project.write("one", formats='[hf]\nmax-shard-size = "70kB"\n').release(out) == 0
    index = json.loads((out / "hf" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert contents(out / "hf") == contents(merged(project, tmp_path / "merged", "--max-shard-size", "70kB"))
    listed = {Path(file["path"]).name for file in json.loads((out / "manifest.json").read_text())["files"]}
    assert shards <= listed
    assert run(["verify", str(out), "-q"]) == 0


def test_the_converter_writes_the_tensors_of_a_merge(project: Project, tmp_path: Path) -> None:
    script = stand_in(project.folder)
    out = tmp_path / "out"
    assert project.write("one", formats=f'[gguf]\ntypes = ["Q8_0"]\nconverter = "{script.name}"\n').release(out) == 0
    [file] = (out / "gguf").iterdir()
    assert GgufFile.open(file).tensors["token_embd.weight"].type == "Q8_0"
    words = ["--to", "gguf", "--quant", "Q8_0", "--converter", str(script)]
    assert tensors(file) == tensors(merged(project, tmp_path / "merged.gguf", *words))
    [artifact] = json.loads((out / "manifest.json").read_text())["artifacts"]
    assert artifact["parameters"] == {"converter": "convert.py", "types": ["Q8_0"]}


def test_another_converter_makes_the_artifact_again(project: Project, tmp_path: Path, capsys: Capture) -> None:
    script, out = stand_in(project.folder), tmp_path / "out"
    project.write("one", formats=f'[gguf]\ntypes = ["Q8_0"]\nconverter = "{script.name}"\n')
    assert project.release(out) == 0
    assert project.release(out, "--resume") == 0
    imported = project.folder / "conversion" / "llama.py"  # beside the script
    imported.parent.mkdir()
    imported.write_text("# another version\n")
    assert project.release(out, "--resume") == 7
    assert "exists already" in capsys.readouterr().err
    shutil.rmtree(imported.parent)
    assert project.release(out, "--resume") == 0
    script.write_text(script.read_text() + "# another version\n")
    assert project.release(out, "--resume") == 7


def test_a_converter_that_fails_is_exit_4_and_leaves_no_release(
    project: Project, tmp_path: Path, capsys: Capture
) -> None:
    (project.folder / "fail.py").write_text("raise SystemExit('this model is not supported')")
    project.write("one", formats='[gguf]\ntypes = ["Q8_0"]\nconverter = "fail.py"\n')
    assert project.release(tmp_path / "out") == 4
    assert capsys.readouterr().err.endswith("exit status 1: this model is not supported\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("memory", ["1B", "8GiB"])
def test_the_memory_of_the_merge_changes_no_artifact(
    memory: str, project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    assert project.write("one", "two", more=f'memory = "{memory}"\n', formats=FORMATS).release(tmp_path / "out") == 0
    ours, theirs = contents(tmp_path / "out"), contents(undisturbed)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == SPEC_FILES
