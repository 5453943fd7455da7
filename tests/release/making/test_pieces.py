from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exporter.cli.main import run
from tests.release.projects import Project, contents

JOBS = tuple(f"{model}/{job}" for model in ("one", "two") for job in ("hf", "gguf-bf16", "gguf-Q8_0", "onnx"))

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def farm(_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The piece of every job, each made from a copy of the inputs as on another machine; treat it as read-only."""
    home = tmp_path_factory.mktemp("farm")
    for number, job in enumerate(JOBS):
        project = Project(_inputs).copy(home / f"machine{number}").write("one", "two")
        assert project.release(home / "pieces" / job.replace("/", "-"), "--only", job) == 0
    return home / "pieces"


def test_joined_pieces_equal_the_release_of_one_machine(
    farm: Path, project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    project.write("one", "two")
    for name in ("base", "one", "two"):
        shutil.rmtree(project.folder / name)  # joining needs no inputs
    assert project.release(tmp_path / "out", "--assemble", farm) == 0
    assert contents(tmp_path / "out") == contents(undisturbed)
    assert run(["verify", str(tmp_path / "out"), "-q"]) == 0


def change(pieces: Path, how: str) -> None:
    weights = pieces / "one-hf" / "one" / "hf" / "model.safetensors"
    record = pieces / "two-onnx" / "piece.json"
    if how == "damaged":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif how == "file lost":
        weights.unlink()
    elif how == "file more":
        (pieces / "one-hf" / "one" / "hf" / "more.bin").write_bytes(b"")
    elif how == "lost":
        shutil.rmtree(pieces / "two-onnx")
    elif how == "twice":
        shutil.copytree(pieces / "two-onnx", pieces / "zwei-onnx")
    elif how == "none":
        shutil.rmtree(pieces)
        pieces.mkdir()
    else:
        description = json.loads(record.read_text())
        if how == "other tools":
            description["release"]["tools"]["numpy"] = "0"
        elif how == "other base":
            description["release"]["base"]["files"]["config.json"] = "0"
        record.write_text(json.dumps(description) if how != "broken" else "{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("damaged", "one-hf/one/hf/model.safetensors: expected sha256"),
        ("file lost", "one-hf/one/hf/model.safetensors: piece.json lists this file, but the file does not exist"),
        ("file more", "one-hf/one/hf/more.bin: piece.json does not list this file"),
        ("lost", "expected a piece for every job, found no piece for two/onnx"),
        ("twice", "expected one piece per job, but the job two/onnx also has the piece"),
        ("none", "expected a piece made with --only"),
        ("other tools", "two-onnx/piece.json: release.tools.numpy: expected"),
        ("other base", "two-onnx/piece.json: release.base.files.config.json: expected"),
        ("broken", "two-onnx/piece.json: expected a JSON description of a piece"),
    ],
)
def test_pieces_that_do_not_fit_are_exit_4(
    how: str, message: str, farm: Path, project: Project, tmp_path: Path, capsys: Capture
) -> None:
    pieces = shutil.copytree(farm, tmp_path / "pieces")
    change(pieces, how)
    assert project.write("one", "two").release(tmp_path / "out", "--assemble", pieces) == 4
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces", "project"]


def test_pieces_of_another_release_toml_are_exit_4(
    farm: Path, project: Project, tmp_path: Path, capsys: Capture
) -> None:
    project.write("one", "two", more="untie = true\n")
    assert project.release(tmp_path / "out", "--assemble", farm) == 4
    assert "made from a different release.toml: release.untie: expected True, found False" in capsys.readouterr().err


def test_an_unknown_job_is_exit_2(project: Project, tmp_path: Path, capsys: Capture) -> None:
    assert project.write("one").release(tmp_path / "out", "--only", "gguf") == 2
    assert "--only: expected one of hf, gguf-bf16, gguf-Q8_0, onnx, found 'gguf'" in capsys.readouterr().err
    assert project.release(tmp_path / "out", "--only", "") == 2, "an empty variable must not make a whole release"


def test_adapters_in_folders_of_the_same_name_get_different_names(project: Project, tmp_path: Path) -> None:
    (project.folder / "other").mkdir()
    (project.folder / "two").rename(project.folder / "other" / "one")
    project.write("one", "other", formats="[hf]\n")
    project.toml.write_text(project.toml.read_text().replace('["other"]', '["other/one"]'))
    assert project.release(tmp_path / "out") == 0
    for job in ("one/hf", "other/hf"):
        assert project.release(tmp_path / "pieces" / job.split("/")[0], "--only", job) == 0
    assert project.release(tmp_path / "joined", "--assemble", tmp_path / "pieces") == 0
    assert contents(tmp_path / "joined") == contents(tmp_path / "out")
    for name, adapter in (("one", "`one`"), ("other", "`one-2`")):
        assert f"with the adapter {adapter}," in (tmp_path / "out" / name / "README.md").read_text()
