from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiers.coverage import FLOORS, ROOT, figures, too_low


def test_lines_are_counted_by_room() -> None:
    lines = {
        ROOT / "exporter" / "errors.py": (10, 1),
        ROOT / "exporter" / "io" / "files.py": (30, 0),
        ROOT / "exporter" / "verify" / "gguf" / "layout.py": (50, 50),
        ROOT / "exporter" / "verify" / "run.py": (50, 0),
        ROOT / "tuner" / "__init__.py": (0, 0),
    }
    assert figures(lines) == {"exporter": 0.9, "exporter/io": 1.0, "exporter/verify": 0.5}


def test_a_room_below_its_floor_is_named_and_so_is_one_that_nothing_measured() -> None:
    shares = {"exporter/io": 0.9, "exporter/verify": 0.5}
    assert too_low(shares, {"exporter/io": 0.9, "exporter/verify": 0.6, "tuner": 0.1}) == ["exporter/verify", "tuner"]


def test_the_last_lines_of_a_run_name_the_rooms_below_their_floors(tmp_path: Path) -> None:
    (tmp_path / "test_short.py").write_text("def test_short():\n    import exporter.version\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COVERAGE_FILE": str(tmp_path / "data")}
    plugins = ("-p", "tests.tiers.coverage", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *plugins, "--cov=exporter.version", "--cov-report=", "--durations=1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    *before, totals = done.stdout.splitlines()
    assert "1 passed" in totals
    assert done.returncode == 1
    low = [room for room in FLOORS if room != "exporter"]
    wanted = [f"TOO LOW: the coverage of {room} is 0.0%, below the floor of {FLOORS[room]:.0%}" for room in low]
    assert before[-len(low) :] == wanted
    summary = before[: -len(low)]
    assert "exporter: 100.0%, floor 95%" in summary
    assert any("slowest" in line for line in summary)
