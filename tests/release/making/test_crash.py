"""Releases that are killed, lack room, or cannot read: nothing is promoted, and --resume goes on where they ended."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from tests.export.test_crash import small_disk
from tests.killed import killer
from tests.processes import ENV, TTEXPORT
from tests.release.projects import RUN, Project, contents, jobs_of

KILLS: Final = 30
#: Modules that a release imports on the way: imported once, before the forks.
USED: Final = (
    "exporter.cli.main",
    "exporter.cli.verbs.release",
    "exporter.formats.gguf.plan",
    "exporter.formats.gguf.stream",
    "exporter.formats.hf.write",
    "exporter.formats.onnx.write",
    "exporter.sources.onnx.file",
    "gguf",
    "huggingface_hub",
    "jinja2",
)
Capture = pytest.CaptureFixture[str]


def staging(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def finished_jobs(out: Path) -> dict[str, float]:
    """Job → seconds, of the whole lines of the journal that a run left."""
    journal = staging(out) / "journal.jsonl"
    found = {}
    for line in journal.read_text().splitlines() if journal.exists() else []:
        try:
            told: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        if told["type"] == "made":
            found[told["job"]] = told["seconds"]
    return found


@pytest.mark.slow
def test_killed_at_thirty_random_moments_a_resumed_release_is_the_undisturbed_one(
    project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    project.write("one", "two")
    work = tmp_path / "work"
    work.mkdir()
    words = ["release", project.toml, "-q", "-o"]
    with killer(work, *USED) as process:
        code, events = process.run(*words, work / "0", "--cache", work / "cache0")
        assert code == 0
        kept = 0
        for number, moment in enumerate(sorted(random.Random(8).sample(range(1, events), KILLS)), 1):
            out, cache = work / str(number), work / f"cache{number}"
            code, _ = process.run(*words, out, "--cache", cache, kill_at=moment)
            assert code == -signal.SIGKILL, f"event {moment} of {events} never came"
            assert not out.exists() or contents(out) == contents(undisturbed)
            finished = finished_jobs(out)
            kept += len(finished)
            assert process.run(*words, out, "--cache", cache, "--resume")[0] == 0
            assert contents(out) == contents(undisturbed)
            assert not staging(out).exists()
            again = {job: facts["seconds"] for job, facts in jobs_of(out).items() if job in finished}
            assert again == finished, "a finished job was repeated"
        assert kept > KILLS, "hardly a kill came late enough to show anything"


def test_what_a_killed_run_left_is_neither_used_nor_lost_by_accident(
    project: Project, tmp_path: Path, capsys: Capture
) -> None:
    project.write("one")
    out = tmp_path / "out"
    with killer(tmp_path, *USED) as process:
        _, events = process.run("release", project.toml, "-q", "-o", tmp_path / "other", "--no-cache")
        process.run("release", project.toml, "-q", "-o", out, "--no-cache", kill_at=events // 2)
    assert finished_jobs(out)
    assert project.release(out) == 7
    assert capsys.readouterr().err.endswith("left by an interrupted run; --resume continues it, --force starts over\n")
    assert finished_jobs(out)
    assert project.release(out, "--force") == 0
    assert not staging(out).exists()


@pytest.mark.parametrize("how", ["changed", "gone", "other adapter", "stray"])
def test_a_resumed_run_believes_the_files_and_not_the_journal(how: str, project: Project, tmp_path: Path) -> None:
    project.write("one")
    out, want = tmp_path / "out", tmp_path / "want"
    with killer(tmp_path, *USED) as process:
        _, events = process.run("release", project.toml, "-q", "-o", want, "--no-cache")
        process.run("release", project.toml, "-q", "-o", out, "--no-cache", kill_at=events * 3 // 4)
    draft = staging(out) / "out"
    weights = draft / "hf" / "model.safetensors"
    if how == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    elif how == "gone":
        weights.unlink()
    elif how == "stray":
        (draft / "hf" / "stray").write_text("")
    else:
        (project.folder / "one").rename(project.folder / "old")
        (project.folder / "two").rename(project.folder / "one")
        want = tmp_path / "other"
        assert project.release(want) == 0
    assert project.release(out, "--resume") == 0
    assert contents(out) == contents(want)


def test_a_release_that_is_finished_is_left_alone_by_resume(project: Project, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert project.write("one").release(out) == 0
    run = (out / RUN).read_bytes()
    assert project.release(out, "--resume") == 0
    assert (out / RUN).read_bytes() == run
    text = project.toml.read_text()
    for other in (text.replace('"1.0"', '"2.0"'), f'{text}[card]\nsummary = "Brighter."\n', text.replace("one", "two")):
        project.toml.write_text(other)
        assert project.release(out, "--resume") == 7
        assert "exists already; --force replaces it" in capsys.readouterr().err


def test_what_is_finished_is_told_again_by_resume(project: Project, tmp_path: Path, capsys: Capture) -> None:
    project.write("one", formats='[hf]\n[gguf]\ntypes = ["bf16"]\n')
    pieces = tmp_path / "pieces"
    runs: list[tuple[Path, tuple[object, ...]]] = [
        (tmp_path / "out", ()),
        (pieces / "hf", ("--only", "hf")),
        (pieces / "gguf", ("--only", "gguf-bf16")),
        (tmp_path / "joined", ("--assemble", pieces)),
    ]
    for out, options in runs:
        told = []
        for resume in ((), ("--resume",)):
            assert project.release(out, *options, *resume, "--json") == 0
            told.append(json.loads(capsys.readouterr().out))
            assert told[-1].pop("seconds") > 0
        assert told[0] == told[1]
        made = [one["job"] for one in told[0]["artifacts"]]
        assert {*made, "verify one"} == told[0]["jobs"].keys()
        assert all(facts["seconds"] > 0 for facts in told[0]["jobs"].values())
        assert all(one["verification"]["passed"] for one in told[0]["artifacts"])


def test_a_piece_of_another_release_is_not_taken_for_this_ones(
    project: Project, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "piece"
    project.write("one", formats="[hf]\n")
    assert project.release(out, "--only", "hf") == 0
    project.toml.write_text(project.toml.read_text().replace('"1.0"', '"2.0"'))
    assert project.release(out, "--only", "hf", "--resume") == 7
    assert project.release(out, "--only", "hf", "--resume", "--force") == 0
    assert project.release(tmp_path / "out", "--assemble", out) == 0


def start(project: Project, out: Path, *options: str, file_nbytes: int | None = None) -> subprocess.Popen[str]:
    """The release as a process; file_nbytes: the longest file that it may write."""

    def limit() -> None:
        if file_nbytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_nbytes, file_nbytes))

    command = [*TTEXPORT, "release", str(project.toml), "-q", "--no-cache", "-o", str(out), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENV, preexec_fn=limit, stdout=pipe, stderr=pipe, text=True)


def test_a_file_that_may_not_grow_is_exit_7_and_resume_goes_on(
    project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    project.write("one", "two")
    out = tmp_path / "out"
    largest = max(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    process = start(project, out, file_nbytes=largest - 1)
    said = process.communicate()[1]
    assert process.returncode == 7, said
    assert said.count("\n") == 1
    assert not out.exists()
    finished = finished_jobs(out)
    assert set(finished) == {"one/hf", "one/gguf-bf16", "one/gguf-Q8_0"}
    assert project.release(out, "--resume") == 0
    assert contents(out) == contents(undisturbed)
    assert {job: jobs_of(out)[job]["seconds"] for job in finished} == finished


def test_a_full_disk_is_exit_7_and_resume_goes_on_once_there_is_room(
    project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    project.write("one", "two")
    nbytes = sum(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", nbytes) as disk:  # the release would fit, what is made on the way does not
        out = disk / "out"
        process = start(project, out)
        said = process.communicate()[1]
        assert process.returncode == 7, said
        assert "no space left on the device" in said
        assert said.count("\n") == 1
        assert not out.exists()
        assert finished_jobs(out)
        subprocess.run(["mount", "-o", f"remount,size={2 * nbytes}", str(disk)], check=True)
        assert project.release(out, "--resume") == 0
        assert contents(out) == contents(undisturbed)


def test_a_file_that_cannot_be_read_is_exit_4_and_leaves_nothing(
    project: Project, undisturbed: Path, tmp_path: Path, capsys: Capture
) -> None:
    project.write("one", "two")
    out, weights = tmp_path / "out", project.folder / "two" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.mkdir()
    assert project.release(out) == 4
    said = capsys.readouterr().err
    assert str(weights) in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project"]
    weights.rmdir()
    weights.write_bytes(content)
    assert project.release(out, "--resume") == 0
    assert contents(out) == contents(undisturbed)
