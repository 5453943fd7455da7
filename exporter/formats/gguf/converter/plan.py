"""Write GGUFs of model families that ttexport does not know, by running llama.cpp's converter on the merged checkpoint.

The user passes the path of llama.cpp's converter script with the option ``--converter``. The converter script runs with
the current Python interpreter, in a separate process without network access.
The GGUF that the script writes is verified like every other GGUF, so a wrong conversion is detected.
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
from exporter.io.staging import sync_file
from exporter.merge.model import MergedModel
from exporter.progress import Progress, silent

#: Runs a script as a program, but refuses all connections except Unix sockets.
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
    """The plan of a GGUF that the converter ``script`` makes from a temporary merged checkpoint."""

    hf: HfLayout
    script: Path
    ftype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes of the temporary merged checkpoint, which is an upper bound for the size of the GGUF."""
        return self.hf.nbytes


def plan_converter(model: MergedModel, script: Path, ftype: str | None) -> ConverterLayout:
    """Plan the temporary merged checkpoint of ``model`` that the converter ``script`` reads.

    The function reads tensor shapes only, no weights. ftype: the file type of the GGUF (F32, F16, BF16 or Q8_0), or
    None to use the dtype of the embedding. Raises NotExpressible if the converter cannot write ``ftype``, and
    UnreadableFile if the script does not exist.
    """
    if not script.is_file():
        raise UnreadableFile(script, "expected llama.cpp's convert_hf_to_gguf.py, but the file does not exist")
    ftype = ftype or model.specs[model.tie.embedding].dtype
    if ftype not in NATIVE_FILE_TYPES:
        known = ", ".join(NATIVE_FILE_TYPES)
        raise NotExpressible("gguf: --converter", f"the converter supports only the file types {known}, not {ftype}")
    return ConverterLayout(plan_hf(model), script.resolve(), ftype)


def write_converted(layout: ConverterLayout, path: Path, progress: Progress = silent) -> None:
    """Write a temporary merged checkpoint beside ``path``, and run the converter script to write the GGUF ``path``.

    The temporary checkpoint is deleted at the end. Raises BadInput if the converter script fails or writes no file; the
    message contains the last line of the script's stderr. Raises OutputError if the temporary checkpoint cannot be
    written.
    """
    place = path.with_name(f".{path.name}.checkpoint")
    try:
        with writing(place):
            place.mkdir()
        checkpoint = place / model_name(layout.hf.model.path)  # llama.cpp names the model after the checkpoint's folder
        write_hf(layout.hf, checkpoint, progress)
        _run(layout, checkpoint, path)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    with writing(path):
        sync_file(path)


def _run(layout: ConverterLayout, checkpoint: Path, path: Path) -> None:
    command = [sys.executable, "-P", "-c", _RUN, str(layout.script), str(checkpoint)]
    command += ["--outfile", str(path.absolute()), "--outtype", layout.ftype.lower()]
    done = subprocess.run(
        command, env=os.environ | _OFFLINE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    if done.returncode or not path.is_file():
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no output on stderr"
        fault = f"exit status {done.returncode}" if done.returncode else "the converter script wrote no GGUF file"
        raise BadInput(f"{layout.script}: {fault}: {last:.500}")
