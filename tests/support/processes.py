"""Run ``ttexport`` as a process and measure it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
TTEXPORT: Final = (sys.executable, "-c", "from exporter.cli import main; main()")
ENV: Final = {**os.environ, "PYTHONPATH": str(ROOT)}
#: A hanging process is ended by its own alarm, long after any test should have finished.
_ALARM_SECONDS: Final = 60
# Until the new program runs, Linux counts the memory of the forking process as well, so a small process must fork.
_LAUNCHER: Final = """
import json, os, signal, subprocess, sys
child = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL, preexec_fn=lambda: signal.alarm(int(sys.argv[1])))
_, status, usage = os.wait4(child.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024]))
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative: the signal), its stderr, and its peak memory."""

    code: int
    stderr: str
    peak_bytes: int


def ttexport(*arguments: object) -> Ended:
    """Run the command line until it ends."""
    command = [sys.executable, "-c", _LAUNCHER, str(_ALARM_SECONDS), *TTEXPORT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENV)
    code, peak_bytes = json.loads(done.stdout)
    return Ended(code, done.stderr, peak_bytes)
