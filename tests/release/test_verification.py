"""Artifacts do not depend on how they are verified: changing [verify] repeats only the verification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import OutputError
from exporter.release.making.make import ArtifactMaker
from exporter.verify.report import Report
from exporter.verify.run import verify
from tests.release.projects import RUN, Project, contents, jobs_of
from tests.support.documents import read_report

FORMATS = '[hf]\n[gguf]\ntypes = ["bf16"]\n'
PROMPTS = 'prompts = "prompts.txt"\n'

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Level and prompts of every requested verification; each runs at level rows, so that no model is run."""
    requests: list[tuple[str, ...]] = []

    def by_rows(*arguments: Any, **options: Any) -> list[Report]:
        requests.append((options["level"], *options["prompts"]))
        return verify(*arguments, **options | {"level": "rows"})

    monkeypatch.setattr("exporter.release.making.run.verify", by_rows)
    return requests


def describe(project: Project, level: str, prompt: str) -> None:
    """Write a release.toml with ``level``, and with prompts at level full."""
    (project.folder / "prompts.txt").write_text(f"{prompt}\n")
    prompts = PROMPTS if level == "full" else ""
    project.write("one", formats=FORMATS, verify=f'[verify]\nlevel = "{level}"\n{prompts}')


def interrupt(project: Project, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Run until everything is made and verified, then fail; return the lines of the journal by job or model."""

    def full(draft: Path, *_: object) -> None:
        raise OutputError(draft, "no space left on the device")

    with monkeypatch.context() as patch:
        patch.setattr("exporter.release.making.run.finish", full)
        assert project.release(out) == 7
    journal = out.with_name(f".{out.name}.partial") / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line]
    return {line.get("job") or f"verify {line['model']}": line for line in lines}


@pytest.mark.parametrize(
    ("before", "after", "again"),
    [
        pytest.param(("full", "Hello."), ("full", "Hello."), [], id="nothing"),
        pytest.param(("full", "Hello."), ("full", "Good night."), [("full", "Good night.")], id="prompts"),
        pytest.param(("full", "Hello."), ("off", "Hello."), [], id="full to off"),
        pytest.param(("off", "Hello."), ("full", "Hello."), [("full", "Hello.")], id="off to full"),
    ],
)
def test_a_change_of_the_verification_does_not_make_artifacts_again(
    before: tuple[str, str],
    after: tuple[str, str],
    again: list[tuple[str, ...]],
    project: Project,
    requested: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    describe(project, *before)
    journal = interrupt(project, out, monkeypatch)
    describe(project, *after)
    requested.clear()
    with monkeypatch.context() as patch:
        patch.delattr(ArtifactMaker, "make")
        assert project.release(out, "--resume") == 0
    assert requested == again
    assert {job: facts["seconds"] for job, facts in jobs_of(out).items()} == {
        job: journal[job]["seconds"] for job in ("hf", "gguf-bf16")
    }
    assert project.release(fresh) == 0
    assert contents(out) == contents(fresh), "an undisturbed run gives the same files"
    resumed, undisturbed = (json.loads((folder / RUN).read_text())["jobs"].get("verify one") for folder in (out, fresh))
    assert (resumed and resumed["verification"]) == (undisturbed and undisturbed["verification"])
    assert (out / "report.json").exists() == (after[0] != "off")


@pytest.mark.slow
def test_a_run_resumed_at_another_level_reports_that_level(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    describe(project, "rows", "Hello.")
    journal = interrupt(project, out, monkeypatch)
    describe(project, "full", "Hello.")
    assert project.release(out, "--resume") == 0
    assert [report["level"] for report in read_report(out)["artifacts"]] == ["full", "full"]
    assert jobs_of(out)["hf"]["seconds"] == journal["hf"]["seconds"], "a finished job was repeated"


@pytest.mark.parametrize("only", [(), ("--only", "hf")], ids=["release", "piece"])
@pytest.mark.usefixtures("requested")
def test_a_release_finished_with_other_prompts_in_the_same_file_is_not_accepted(
    only: tuple[str, ...], project: Project, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    describe(project, "full", "Hello.")
    assert project.release(out, *only) == 0
    assert project.release(out, *only, "--resume") == 0
    describe(project, "full", "Good night.")
    capsys.readouterr()
    assert project.release(out, *only, "--resume") == 7
    assert capsys.readouterr().err == f"ttexport: {out}: the output exists already; use --force to replace the output\n"


@pytest.mark.usefixtures("requested")
def test_pieces_verified_with_different_prompts_in_files_of_one_name_are_exit_4(
    project: Project, tmp_path: Path, capsys: Capture
) -> None:
    pieces = tmp_path / "pieces"
    for job, prompt in (("gguf-bf16", "Hello."), ("hf", "Good night.")):
        describe(project, "full", prompt)
        assert project.release(pieces / job, "--only", job) == 0
    capsys.readouterr()
    assert project.release(tmp_path / "out", "--assemble", pieces) == 4
    stderr = capsys.readouterr().err
    place, first = pieces / "hf" / "piece.json", pieces / "gguf-bf16" / "piece.json"
    assert stderr.startswith(f"ttexport: {place}: release.verify.prompts: expected the prompts of {first} (digest ")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    describe(project, "full", "Hello.")
    assert project.release(pieces / "hf", "--only", "hf", "--force") == 0
    assert project.release(tmp_path / "out", "--assemble", pieces) == 0
    made = tmp_path / "made"
    assert project.release(made) == 0
    assert contents(tmp_path / "out") == contents(made)


@pytest.mark.usefixtures("requested")
def test_a_finished_release_that_was_not_cleaned_up_is_accepted_only_with_the_same_settings(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    describe(project, "full", "Hello.")
    with monkeypatch.context() as patch:
        patch.setattr("exporter.io.staging._discard", lambda folder: None)
        assert project.release(out) == 0
    finished = contents(out)
    describe(project, "off", "Hello.")
    assert project.release(out, "--resume") == 7
    assert contents(out) == finished
    describe(project, "full", "Hello.")
    assert project.release(out, "--resume") == 0
