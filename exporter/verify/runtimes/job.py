"""The interface of a runtime's process: a JSON job as input, one .npy array per result as output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import TTExportError
from exporter.io.processes import OFFLINE, failure
from exporter.tensors import Array


class RuntimeFailed(TTExportError):
    """A runtime refused an artifact or crashed on it; the verdict is then not equivalent."""

    exit_code = 3


def run(runtime: str, job: Mapping[str, Any], folder: Path) -> Callable[[str], Array]:
    """Run ``exporter.verify.runtimes.<runtime>`` on ``job`` in ``folder``; return a reader of its arrays by name.

    Raises RuntimeFailed with the last line of the process on stderr.
    """
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, **OFFLINE, "TOKENIZERS_PARALLELISM": "false"}
    # Threads that spin while they wait slow a busy machine down many times, and do not speed up an idle one.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if reason := failure(f"exporter.verify.runtimes.{runtime}", str(folder), environment=environment):
        raise RuntimeFailed(f"{runtime}: {reason}")

    def result(name: str) -> Array:
        array: Array = np.load(folder / f"{name}.npy", allow_pickle=False, mmap_mode="r")
        return array

    return result


def serve(compute: Callable[[Mapping[str, Any], Callable[[str, Array], None]], None]) -> None:
    """The main function of a runtime's process: call ``compute`` with the job and a function that saves an array."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())

    def save(name: str, value: Array) -> None:
        np.save(folder / f"{name}.npy", value, allow_pickle=False)

    compute(job, save)
