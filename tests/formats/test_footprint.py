"""The memory that a plan predicts is near the measured peak of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.cli.main import run

#: The estimate is for choosing a machine, not for accounting.
WITHIN = 1.4
#: Run by a small process in between, because a child's peak starts at that of its parent.
MEASURE = "import os, sys; print(os.wait4(os.spawnv(os.P_NOWAIT, sys.executable, sys.argv[1:]), 0)[2].ru_maxrss)"


@pytest.mark.parametrize("fmt", ["hf", "gguf", "onnx"])
def test_the_planned_peak_is_near_the_measured_one(
    fmt: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(tiny_adapter), "--base", str(tiny_tied), "--to", fmt, "-o", str(tmp_path / "out")]
    assert run(["plan", *args, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["targets"][0]["peak_nbytes"]
    command = [sys.executable, "-c", "from exporter.cli import main; main()", "merge", *args, "--quiet"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=True)
    measured = int(done.stdout.split()[-1]) * 1024
    assert (tmp_path / "out").exists()
    assert measured / WITHIN <= planned <= measured * WITHIN, (planned, measured)
