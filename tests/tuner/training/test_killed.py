"""A ``tune --force`` that is killed at any moment leaves one whole adapter at its output: the old or the new."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Final

import pytest

from exporter.io.staging import staging_folder
from tests.support.killed import killer
from tuner.training.folder import staged_adapter

MODULE: Final = __name__
WHOLE_RUNS: Final = 6


def replace(arguments: list[str]) -> int:
    """Run in the fork: replace the adapter ``out`` by a copy of ``new``, as a training run does at its end."""
    new, out = map(Path, arguments)
    with staged_adapter(out, force=True) as folder:
        shutil.copytree(new, folder, dirs_exist_ok=True)
    return 0


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def adapter(folder: Path, version: str, files: int) -> Path:
    (folder / "sub").mkdir(parents=True)
    for name in ("adapter_config.json", *(f"sub/{number}" for number in range(files))):
        (folder / name).write_text(f"{version} {name}")
    return folder


def test_a_kill_at_every_step_of_the_replacement_leaves_the_old_or_the_new_adapter(tmp_path: Path) -> None:
    new, out = adapter(tmp_path / "new", "new", 4), tmp_path / "place" / "out"
    old = adapter(tmp_path / "old", "old", 3)
    left = []
    with killer(out.parent, MODULE) as process:
        for moment in range(1, 1000):
            shutil.rmtree(out.parent, ignore_errors=True)
            shutil.copytree(old, out)
            code, events = process.run(new, out, kill_at=moment, function=f"{MODULE}:replace")
            if code == 0:
                break
            assert code == -signal.SIGKILL
            assert {path.name for path in out.parent.iterdir()} <= {"out", staging_folder(out).name}
            assert contents(out) in (contents(old), contents(new)), f"event {moment} left a part"
            left.append(contents(out) == contents(new))
            # The next run clears what the killed one left.
            assert process.run(new, out, function=f"{MODULE}:replace")[0] == 0
            assert contents(out) == contents(new)
            assert list(out.parent.iterdir()) == [out]
    assert moment == events + 1, "a step was not reached"
    assert left == sorted(left), "the old adapter came back"
    assert {*left} == {False, True}, "the exchange lies outside the steps"


@pytest.mark.slow
def test_a_killed_training_run_leaves_the_old_or_the_new_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    old, out = adapter(tmp_path / "old", "old", 3), work / "out"
    words = [
        "tune",
        base,
        "--data",
        data,
        "--new-token",
        "<ship>",
        "--steps",
        "2",
        "--save-every",
        "1",
        "-q",
        "--force",
    ]
    with killer(work, "exporter.cli.main", "tuner.training.train", "matplotlib.figure") as process:
        code, events = process.run(*words, "-o", out)
        assert code == 0
        new = contents(out)
        for moment in [*range(1, events, events // WHOLE_RUNS), events - 1, events]:
            shutil.rmtree(work)
            shutil.copytree(old, out)
            code, _ = process.run(*words, "-o", out, kill_at=moment)
            assert code == -signal.SIGKILL, f"event {moment} of {events} never came"
            assert contents(out) in (contents(old), new), f"event {moment} of {events} left a part"
            assert process.run(*words, "-o", out)[0] == 0
            assert contents(out) == new
            assert [path.name for path in work.iterdir()] == ["out"]
    assert json.loads(new["train.json"])["settings"]["steps"] == 2
