"""The way out for models without a family: llama.cpp's own converter, run on the merged checkpoint.

The user names the script; it runs with this Python, in a process of its own that has no network. What it writes is
verified like any other file, so it needs not be trusted, and no code of it is taken over.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, NotExpressible, UnreadableFile, writing
from exporter.formats.gguf.metadata import model_name
from exporter.formats.gguf.quantisation.file_types import NATIVE_FILE_TYPES
from exporter.formats.hf.write import HfLayout, plan_hf, write_hf
from exporter.merge.model import MergedModel
from exporter.progress import Progress, silent

#: Runs a script as if it had been called, but for connections: only those within the machine's file system are made.
_RUN: Final = """
import os, runpy, sys
def refuse(event, args):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(args[1], tuple)):
        raise PermissionError("the converter runs without network")
sys.addaudithook(refuse)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True)
class ConverterLayout:
    """The checkpoint to stage for ``script``, and the type of file to ask it for. nbytes: those of the checkpoint."""

    hf: HfLayout
    script: Path
    ftype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the staged checkpoint; the file has as many or fewer."""
        return self.hf.nbytes


def plan_converter(model: MergedModel, script: Path, ftype: str | None) -> ConverterLayout:
    """Lay out the checkpoint of ``model`` for ``script``; reads shapes only.

    ftype: F32, F16, BF16 or Q8_0; None for the dtype of the embedding. Raises NotExpressible for another one,
    UnreadableFile if there is no such script.
    """
    if not script.is_file():
        raise UnreadableFile(script, "expected llama.cpp's convert_hf_to_gguf.py, found no file")
    kind = ftype or model.specs[model.tie.embedding].dtype
    if kind not in NATIVE_FILE_TYPES:
        known = ", ".join(NATIVE_FILE_TYPES)
        raise NotExpressible("gguf: --converter", f"the converter writes {known}, not {kind}")
    return ConverterLayout(plan_hf(model), script.resolve(), kind)


def write_converted(layout: ConverterLayout, path: Path, progress: Progress = silent) -> None:
    """Stage the merged checkpoint beside ``path``, let the script write ``path``, and remove the checkpoint again.

    Raises BadInput with the script's last words if it fails or writes nothing; OutputError as the writers do.
    """
    place = path.with_name(f".{path.name}.checkpoint")
    try:
        with writing(place):
            place.mkdir()
        checkpoint = place / model_name(layout.hf.model.path)  # llama.cpp names the model after its folder
        write_hf(layout.hf, checkpoint, progress)
        _run(layout, checkpoint, path)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    with writing(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _run(layout: ConverterLayout, checkpoint: Path, path: Path) -> None:
    command = [sys.executable, "-P", "-c", _RUN, str(layout.script), str(checkpoint)]
    command += ["--outfile", str(path.absolute()), "--outtype", layout.ftype.lower()]
    done = subprocess.run(
        command, env=os.environ | _OFFLINE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    if done.returncode or not path.is_file():
        words = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        last = words[-1].strip() if words else "it said nothing"
        what = f"exit status {done.returncode}" if done.returncode else "no file came of it"
        raise BadInput(f"{layout.script}: {what}: {last:.500}")
