"""Run llama.cpp's converter in a separate process without network, and report the growth of its output file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import writing
from exporter.formats.gguf.converter import offline
from exporter.formats.gguf.converter.faults import Failure, explained
from exporter.io.processes import OFFLINE
from exporter.progress import Progress

_POLL_SECONDS: Final = 0.25
#: With this variable, the converter would not use its own gguf package.
_FOREIGN_GGUF: Final = "NO_LOCAL_GGUF"


@dataclass(frozen=True)
class Conversion:
    """One run of the converter ``script`` with the options ``arguments``.

    base, architecture: what error messages name, instead of the overlay that the script reads.
    """

    script: Path
    ftype: str
    arguments: Sequence[str]
    base: Path
    architecture: str


def run_converter(conversion: Conversion, checkpoint: Path, path: Path, progress: Progress) -> None:
    """Convert the folder ``checkpoint`` to the GGUF ``path``. The script's messages are kept beside ``checkpoint``.

    Raises the errors of ``explained`` if the script fails or writes no file.
    """
    command = [sys.executable, "-P", str(Path(offline.__file__)), str(conversion.script), str(checkpoint)]
    command += ["--outfile", str(path.absolute()), "--outtype", conversion.ftype.lower(), *conversion.arguments]
    environment = {name: value for name, value in os.environ.items() if name != _FOREIGN_GGUF} | OFFLINE
    messages = checkpoint.with_name("messages.txt")
    with writing(messages), messages.open("xb") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        reached = 0
        while process.poll() is None:
            reached = _report(path, reached, progress)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
        _report(path, reached, progress)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode or not path.is_file():
        text = messages.read_bytes().decode(errors="replace")
        lines = tuple(line for line in text.splitlines() if line.strip())
        raise explained(Failure(conversion.script, conversion.base, conversion.architecture, process.returncode, lines))


def _report(path: Path, reached: int, progress: Progress) -> int:
    """Report the bytes that were written since the last call, and return the size of the file."""
    size = path.stat().st_size if path.exists() else 0
    progress(max(0, size - reached))
    return max(size, reached)
