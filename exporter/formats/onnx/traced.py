"""The general way to ONNX: a model that no family describes is traced by torch.onnx, in a process of its own.

The merged checkpoint is written first, as transformers reads it; the traced graph gets the names and the layout of the
graphs that are built from descriptions. Costs what transformers costs: the whole model in memory, and minutes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import MissingDependency, NotExpressible, UnreadableFile, writing
from exporter.formats.hf import HfLayout, plan_hf, write_hf
from exporter.formats.onnx.client_files import client_files
from exporter.formats.onnx.write import DATA, FOLDER, MODEL
from exporter.formats.output import Progress, silent
from exporter.merge.model import MergedModel
from exporter.staging import write_file

_NEEDED: Final = ("torch", "transformers", "onnxscript")


@dataclass(frozen=True)
class TracedLayout:
    """The merged checkpoint that will be traced, and what lies beside the graph."""

    checkpoint: HfLayout
    files: dict[str, bytes]
    reason: str

    @property
    def nbytes(self) -> int:
        """Bytes of all weights: the graph holds each once."""
        return self.checkpoint.nbytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of this way."""
        return (f"{self.reason}: traced by torch.onnx.export, with the whole model in memory", "no genai_config.json")


def plan_traced(model: MergedModel, refusal: NotExpressible) -> TracedLayout:
    """Lay out the checkpoint to trace. refusal: why no family describes the model.

    Raises MissingDependency, or ``refusal`` for models of an encoder and a decoder.
    """
    if model.config.get("is_encoder_decoder"):
        raise refusal
    for package in _NEEDED:
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(
                package, needed_for="a model without a family of its own", install="ttexport[trace]"
            )
    return TracedLayout(plan_hf(model), client_files(model, None), refusal.reason)


def write_traced(layout: TracedLayout, out: Path, progress: Progress = silent) -> None:
    """Write the folder ``out``. Memory and time: the tracing process's.

    Raises OutputError, and NotExpressible with the last line of a tracing process that failed.
    """
    checkpoint = out.with_name(f"{out.name}-checkpoint")
    with writing(out):
        (out / FOLDER).mkdir(parents=True)
    try:
        write_hf(layout.checkpoint, checkpoint, progress)
        _trace(checkpoint, out / FOLDER / MODEL)
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
    for name, content in sorted(layout.files.items()):
        write_file(out / name, content)


def _trace(checkpoint: Path, model: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, "-m", "exporter.formats.onnx.tracing", str(checkpoint), str(model), DATA]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"it ended with code {done.returncode}"
        raise NotExpressible("onnx", f"torch.onnx.export failed on this model: {reason}", instead="--to hf holds it")
    for path in (model, model.with_name(DATA)):
        if not path.is_file():
            raise UnreadableFile(path, "expected the traced model, found no such file")
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
