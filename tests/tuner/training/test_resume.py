"""A run that is killed and resumed ends with the same rows as an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tuner.cli import main
from tuner.training.work import last_checkpoint, work_folder

# Eight steps in three passes over the data, a checkpoint every second one; the kill falls between two of them.
RUN = ("--new-token", "<ship>", "--token", " the", "--steps", "8", "--batch-size", "1", "--save-every", "2", "-q")
KILLED_AT = 5

DRIVER = """
import os, signal, sys
import tuner.training.trainer
from tuner.cli import main

step = tuner.training.trainer.RowsTrainer.training_step

def deadly(self, *args, **kwargs):
    if self.state.global_step == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

tuner.training.trainer.RowsTrainer.training_step = deadly
sys.exit(main(sys.argv[1:]))
"""


def arguments(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [str(base), "--data", str(data), "-o", str(out), *RUN, *more]


@pytest.fixture
def killed(base: Path, data: Path, tmp_path: Path) -> Path:
    """The output of a run that was killed after step 5: it does not exist, only the checkpoints beside it."""
    out = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments(base, data, out)],
        env={**os.environ, "KILL_AT": str(KILLED_AT), "PYTHONPATH": os.getcwd()},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not out.exists()
    return out


def test_a_killed_run_resumes_to_the_rows_of_an_uninterrupted_one(
    base: Path, data: Path, tmp_path: Path, killed: Path
) -> None:
    whole = tmp_path / "whole"
    assert main(arguments(base, data, whole)) == 0
    checkpoint = last_checkpoint(work_folder(killed))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    assert main(arguments(base, data, killed, "--resume")) == 0
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert not work_folder(killed).exists()


def test_checkpoints_hold_rows_and_their_optimiser_never_the_model(killed: Path, base: Path) -> None:
    checkpoint = last_checkpoint(work_folder(killed))
    assert checkpoint is not None
    rows = load_file(checkpoint / "adapter_model.safetensors")
    assert all(name.endswith("trainable_tokens_delta") for name in rows)
    weights = [path for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".pt", ".bin")]
    assert sum(path.stat().st_size for path in weights) < (base / "model.safetensors").stat().st_size


def test_a_run_with_other_settings_is_not_resumed(
    base: Path, data: Path, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(base, data, killed, "--resume", "--lr", "0.5")) == 2
    assert "run.json: lr: expected 0.5, found 0.01" in capsys.readouterr().err
    other = data.with_name("other.jsonl")
    other.write_text(data.read_text() + json.dumps({"text": "one more line"}) + "\n")
    assert main(arguments(base, other, killed, "--resume")) == 2
    assert "run.json: data_digest: expected" in capsys.readouterr().err
    assert last_checkpoint(work_folder(killed)) is not None


def test_an_unfinished_run_is_neither_lost_nor_resumed_by_accident(
    base: Path, data: Path, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(base, data, killed)) == 7
    assert "--resume" in capsys.readouterr().err
    assert main(arguments(base, data, killed, "--force")) == 0
    assert (killed / "train.json").is_file()
