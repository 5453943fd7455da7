"""Runs modules of ttexport as ``python -m MODULE`` in separate processes that cannot access the model hub."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Final

#: Environment in which neither huggingface_hub nor transformers connects to the hub.
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def failure(module: str, *arguments: str, environment: Mapping[str, str]) -> str | None:
    """Run ``module`` in a new process, wait until the process ends, and return the reason for a failure.

    Returns None on success. On failure, returns the last line of the process's stderr, or the exit code if stderr is
    empty.
    """
    ended = launch(module, arguments, environment)
    if not ended.returncode:
        return None
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"{module} ended with exit code {ended.returncode}"


def launch(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Start ``module`` in a new Python interpreter and wait until the process ends.

    If a signal killed the process, ``returncode`` is the negative signal number.
    """
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
