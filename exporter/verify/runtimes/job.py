"""The interface of a runtime's process. The input is a JSON job, and the output is one .npy file per array."""

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
    """A runtime refused an artifact or crashed with the artifact, so the verdict is not equivalent."""

    exit_code = 3


def run(runtime: str, job: Mapping[str, Any], folder: Path) -> Callable[[str], Array]:
    """Run ``exporter.verify.runtimes.<runtime>`` on ``job``.

    folder: new folder for the job and the arrays.  Returns a function that reads an array by its name.

    Raises RuntimeFailed with the last line that the process wrote to stderr.
    """
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, **OFFLINE, "TOKENIZERS_PARALLELISM": "false"}
    # Threads that spin while waiting slow down a busy machine many times and do not speed up an idle machine.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if reason := failure(f"exporter.verify.runtimes.{runtime}", str(folder), environment=environment):
        raise RuntimeFailed(f"{runtime}: {reason}")

    def result(name: str) -> Array:
        array: Array = np.load(folder / f"{name}.npy", allow_pickle=False, mmap_mode="r")
        return array

    return result


def serve(compute: Callable[[Mapping[str, Any], Callable[[str, Array], None]], None]) -> None:
    """Run the main function of a runtime's process.

    compute: function that is called with the job and with a function that saves an array under a name.
    """
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())

    def save(name: str, value: Array) -> None:
        np.save(folder / f"{name}.npy", value, allow_pickle=False)

    compute(job, save)
