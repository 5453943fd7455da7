"""``ttexport`` as a whole process, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
TTEXPORT: Final = (sys.executable, "-c", "from exporter.cli import main; main()")
ENV: Final = {**os.environ, "PYTHONPATH": str(ROOT)}
#: A process that hangs is ended by its own alarm clock; far beyond what any needs.
_ALARM_SECONDS: Final = 60
# Linux counts the memory of the process that forked, too, until the new program runs: so a small one must do it.
_LAUNCHER: Final = """
import json, os, signal, subprocess, sys
child = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL, preexec_fn=lambda: signal.alarm(int(sys.argv[1])))
_, status, usage = os.wait4(child.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024]))
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative: the signal), what it said, and the most memory it ever held."""

    code: int
    stderr: str
    peak_bytes: int


def ttexport(*words: object) -> Ended:
    """Run the command line to its end."""
    command = [sys.executable, "-c", _LAUNCHER, str(_ALARM_SECONDS), *TTEXPORT, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENV)
    code, peak_bytes = json.loads(done.stdout)
    return Ended(code, done.stderr, peak_bytes)
