"""Releases that are killed, run out of space, or cannot read an input: nothing is published, and --resume continues."""

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
from tests.release.projects import RUN, Project, contents, jobs_of
from tests.support.killed import killer
from tests.support.processes import ENV, TTEXPORT

KILLS: Final = 30
#: Modules that a release imports while it runs; imported once, before the forks.
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
    """Job → seconds, from the complete lines of an interrupted run's journal."""
    journal = staging(out) / "journal.jsonl"
    seconds = {}
    for line in journal.read_text().splitlines() if journal.exists() else []:
        try:
            entry: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["type"] == "made":
            seconds[entry["job"]] = entry["seconds"]
    return seconds


@pytest.mark.slow
def test_a_release_killed_at_thirty_random_moments_and_resumed_equals_an_undisturbed_one(
    project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    project.write("one", "two")
    work = tmp_path / "work"
    work.mkdir()
    arguments = ["release", project.toml, "-q", "-o"]
    with killer(work, *USED) as process:
        code, events = process.run(*arguments, work / "0", "--cache", work / "cache0")
        assert code == 0
        kept = 0
        for number, moment in enumerate(sorted(random.Random(8).sample(range(1, events), KILLS)), 1):
            out, cache = work / str(number), work / f"cache{number}"
            code, _ = process.run(*arguments, out, "--cache", cache, kill_at=moment)
            assert code == -signal.SIGKILL, f"event {moment} of {events} never came"
            assert not out.exists() or contents(out) == contents(undisturbed)
            finished = finished_jobs(out)
            kept += len(finished)
            assert process.run(*arguments, out, "--cache", cache, "--resume")[0] == 0
            assert contents(out) == contents(undisturbed)
            assert not staging(out).exists()
            again = {job: facts["seconds"] for job, facts in jobs_of(out).items() if job in finished}
            assert again == finished, "a finished job was repeated"
        assert kept > KILLS, "too few kills came late enough to test resuming"


def test_leftovers_of_a_killed_run_are_neither_used_nor_removed_without_an_option(
    project: Project, tmp_path: Path, capsys: Capture
) -> None:
    project.write("one")
    out = tmp_path / "out"
    with killer(tmp_path, *USED) as process:
        _, events = process.run("release", project.toml, "-q", "-o", tmp_path / "other", "--no-cache")
        process.run("release", project.toml, "-q", "-o", out, "--no-cache", kill_at=events // 2)
    assert finished_jobs(out)
    assert project.release(out) == 7
    assert capsys.readouterr().err.endswith(
        "an interrupted run left this folder; use --resume to continue or --force to start over\n"
    )
    assert finished_jobs(out)
    assert project.release(out, "--force") == 0
    assert not staging(out).exists()


@pytest.mark.parametrize("how", ["changed", "gone", "other adapter", "stray"])
def test_a_resumed_run_checks_the_files_that_the_journal_lists(how: str, project: Project, tmp_path: Path) -> None:
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
        assert "the output exists already; use --force to replace the output" in capsys.readouterr().err


def test_resume_prints_a_finished_release_again(project: Project, tmp_path: Path, capsys: Capture) -> None:
    project.write("one", formats='[hf]\n[gguf]\ntypes = ["bf16"]\n')
    pieces = tmp_path / "pieces"
    runs: list[tuple[Path, tuple[object, ...]]] = [
        (tmp_path / "out", ()),
        (pieces / "hf", ("--only", "hf")),
        (pieces / "gguf", ("--only", "gguf-bf16")),
        (tmp_path / "joined", ("--assemble", pieces)),
    ]
    for out, options in runs:
        documents = []
        for resume in ((), ("--resume",)):
            assert project.release(out, *options, *resume, "--json") == 0
            documents.append(json.loads(capsys.readouterr().out))
            assert documents[-1].pop("seconds") > 0
        assert documents[0] == documents[1]
        made = [artifact["job"] for artifact in documents[0]["artifacts"]]
        assert {*made, "verify one"} == documents[0]["jobs"].keys()
        assert all(facts["seconds"] > 0 for facts in documents[0]["jobs"].values())
        assert all(artifact["verification"]["passed"] for artifact in documents[0]["artifacts"])


def test_a_piece_of_another_release_is_refused(project: Project, tmp_path: Path, capsys: Capture) -> None:
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


def test_a_limit_of_the_file_size_is_exit_7_and_resume_continues(
    project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    project.write("one", "two")
    out = tmp_path / "out"
    largest = max(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    process = start(project, out, file_nbytes=largest - 1)
    stderr = process.communicate()[1]
    assert process.returncode == 7, stderr
    assert stderr.count("\n") == 1
    assert not out.exists()
    finished = finished_jobs(out)
    assert set(finished) == {"one/hf", "one/gguf-bf16", "one/gguf-Q8_0"}
    assert project.release(out, "--resume") == 0
    assert contents(out) == contents(undisturbed)
    assert {job: jobs_of(out)[job]["seconds"] for job in finished} == finished


def test_a_full_disk_is_exit_7_and_resume_continues_with_more_space(
    project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    project.write("one", "two")
    nbytes = sum(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", nbytes) as disk:  # the release would fit, but not with its intermediate files
        out = disk / "out"
        process = start(project, out)
        stderr = process.communicate()[1]
        assert process.returncode == 7, stderr
        assert "no space left on the device" in stderr
        assert stderr.count("\n") == 1
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
    stderr = capsys.readouterr().err
    assert str(weights) in stderr
    assert stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project"]
    weights.rmdir()
    weights.write_bytes(content)
    assert project.release(out, "--resume") == 0
    assert contents(out) == contents(undisturbed)
