"""Modules of this project run as ``python -m MODULE``, each in a process of its own, without the model hub."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Final

#: Environment in which neither huggingface_hub nor transformers connects to the hub.
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def failure(module: str, *arguments: str, environment: Mapping[str, str]) -> str | None:
    """Run ``module`` to its end; return None if it succeeded, else the last line of its stderr or its exit code."""
    ended = launch(module, arguments, environment)
    if not ended.returncode:
        return None
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with code {ended.returncode}"


def launch(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Start ``module`` in a fresh interpreter and wait for it. returncode: negative for the signal that ended it."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
