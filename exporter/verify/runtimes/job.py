"""Start a process that runs a model, and exchange the job and the results with the process.

The process reads a JSON job and writes each result array to a .npy file.
"""

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
    """Raised if a runtime rejects an artifact or crashes while running the artifact.

    If ``RuntimeFailed`` is raised, the verdict for the artifact is "not equivalent".
    """

    exit_code = 3


def run(runtime: str, job: Mapping[str, Any], folder: Path) -> Callable[[str], Array]:
    """Run the module ``exporter.verify.runtimes.<runtime>`` on ``job`` in a new process.

    folder: path of the folder to create for the job and the result arrays.  Returns a function that reads a result
    array by name.

    Raises RuntimeFailed, with the last line of the process's stderr as the message, if the process fails.
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
    """Main function of a runtime's process: read the job, call ``compute`` and write the result arrays.

    compute: a function (job, save), where ``save(name, array)`` writes a result array.
    """
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())

    def save(name: str, value: Array) -> None:
        np.save(folder / f"{name}.npy", value, allow_pickle=False)

    compute(job, save)
