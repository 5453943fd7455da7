"""Measure the peak memory of a process together with all descendant processes.

To run the processes, a machine needs at least as much free memory as the combined peak.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_EVERY_SECONDS = 0.05


class TreePeak:
    """Samples the memory of the process ``pid`` and its descendants while the block runs.

    The measured value is the proportional set size, which counts pages that two or more processes map, such as cached
    weights, only once. The measured peak may be too low, because a peak between two samples is missed. Linux only.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> TreePeak:
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            self.peak_bytes = max(self.peak_bytes, sum(map(_nbytes, _tree(self.pid))))


def _tree(pid: int) -> list[int]:
    pids = [pid]
    for parent in pids:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            pids += map(int, _read(task).split())
    return pids


def _nbytes(pid: int) -> int:
    for line in _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


def _read(path: Path) -> str:
    """Return the text of a file in ``/proc``, or an empty text if the process has already ended."""
    try:
        return path.read_text()
    except OSError:
        return ""
