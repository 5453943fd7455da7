from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path

import pytest

from exporter.errors import UsageError
from exporter.progress import Hooks
from exporter.release.making.store import Cache
from exporter.release.spec import ReleaseSpec
from tests.release.projects import Project, contents, jobs_of
from tests.support.processes import ROOT

Capture = pytest.CaptureFixture[str]

# Read by every Python that starts with it on its path, and so by Ray's workers.
_MERGES_NOTHING = """
from exporter.merge.passes import ReplaceRows
ReplaceRows.apply = lambda self, start, value: value
"""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray on this machine, whose workers run the code under test."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def staging(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_release_on_ray_equals_that_of_one_machine(
    project: Project, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write("one", "two")
    monkeypatch.chdir(tmp_path)
    cache = Path("cache")
    assert Project(Path("project")).release(Path("out"), "--ray", "local", cache=cache) == 0
    out = tmp_path / "out"
    assert contents(out) == contents(undisturbed)
    assert jobs_of(out).keys() == jobs_of(undisturbed).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "project"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_piece_locked_by_another_run_ends_the_release_and_resume_keeps_finished_pieces(
    project: Project, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    pieces = staging(out) / "pieces"
    project.write("one", formats='[hf]\n[gguf]\ntypes = ["bf16"]\n')
    assert project.release(pieces / "hf", "--only", "hf") == 0
    seconds = json.loads((pieces / "hf" / "piece.json").read_text())["made"]["seconds"]
    held = pieces / ".gguf-bf16.partial"
    held.mkdir()
    lock = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert project.release(out, "--ray", "local", "--resume") == 7
    finally:
        os.close(lock)
    stderr = capsys.readouterr().err
    assert stderr == f"ttexport: {pieces / 'gguf-bf16'}: another run is writing this output\n"
    assert not out.exists()
    assert project.release(out, "--ray", "local") == 7, "leftovers are neither used nor removed without an option"
    assert project.release(out, "--ray", "local", "--resume") == 0
    assert jobs_of(out)["hf"]["seconds"] == seconds, "a finished job was repeated"
    assert not staging(out).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_failed_verification_on_a_node_is_exit_3_and_promotes_nothing(
    project: Project, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(_MERGES_NOTHING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'broken'}{os.pathsep}{ROOT}")
    out = tmp_path / "out"
    assert project.write("one", formats="[hf]\n").release(out, "--ray", "local", "--json") == 3
    stdout, stderr = capsys.readouterr()
    report = staging(out) / "pieces" / ".hf.partial" / "report.json"
    assert stderr.startswith("ttexport: hf: hf: not equivalent: ")
    assert stderr.endswith(f"no release was published; for details, see {report}\n")
    assert json.loads(stdout)["artifacts"][0]["passed"] is False, "the report came back with the error"
    assert report.exists()
    assert not out.exists()


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(
    ("address", "code", "message"),
    [
        ("127.0.0.1:1", 7, "no Ray cluster can be reached at this address: "),
        ("ray://127.0.0.1:1", 7, "no Ray cluster can be reached at this address: "),
        ("nowhere", 2, "expected local, auto, HOST:PORT or ray://HOST:PORT: "),
    ],
)
def test_without_a_cluster_nothing_is_left(
    address: str, code: int, message: str, project: Project, tmp_path: Path, capsys: Capture
) -> None:
    assert project.write("one").release(tmp_path / "out", "--ray", address) == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"ttexport: --ray {address}: {message}")
    assert stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_without_ray_it_is_exit_6_with_the_package_to_install(
    project: Project, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert project.write("one").release(tmp_path / "out", "--ray", "local") == 6
    assert capsys.readouterr().err == "ttexport: --ray needs ray; run pip install 'ttexport[ray]'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_paths_passed_to_a_cluster_are_absolute(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task starts in a folder of its node, not in the current folder of the command."""
    paths: list[Path] = []

    def stop(spec: ReleaseSpec, address: str, out: Path, hooks: Hooks, *, cache: Cache, **_: object) -> None:
        paths.extend([Path(spec.base), Path(spec.models["one"].adapters[0]), cache.folder])
        raise UsageError("stopped by the test")

    monkeypatch.setattr("exporter.cli.verbs.release.release_on_ray", stop)
    monkeypatch.chdir(tmp_path)
    project.write("one")
    assert Project(Path("project")).release(Path("out"), "--ray", "auto", cache=Path("cache")) == 2
    assert paths == [project.folder / "base", project.folder / "one", tmp_path / "cache"]


@pytest.mark.parametrize(
    "other", [("--only", "hf"), ("--matrix",), ("--assemble", "pieces")], ids=lambda options: options[0]
)
def test_ray_excludes_the_options_of_partial_runs(
    other: tuple[str, ...], project: Project, tmp_path: Path, capsys: Capture
) -> None:
    assert project.write("one").release(tmp_path / "out", "--ray", "local", *other) == 2
    assert "--only, --matrix, --assemble and --ray are mutually exclusive" in capsys.readouterr().err
