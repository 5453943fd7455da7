"""The general way to ONNX: a model that no family describes is traced by torch.onnx, in a process of its own.

The merged checkpoint is written first, as transformers reads it; the traced graphs get the names and the layout of
those that are built from descriptions. Costs what transformers costs: the whole model in memory, and minutes.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import NotExpressible, UnreadableFile, writing
from exporter.formats.hf.write import HfLayout, plan_hf, write_hf
from exporter.formats.onnx.client_files import client_files
from exporter.formats.onnx.weights.precision import PRECISIONS, Precision
from exporter.formats.onnx.write import DATA_SUFFIX, FOLDER, MODEL_SUFFIX
from exporter.io.processes import OFFLINE, failure
from exporter.io.staging import write_file
from exporter.merge.model import MergedModel
from exporter.packages import TRACE
from exporter.progress import Progress, silent

#: How ``plan`` calls the ways to a graph.
DECODER_WAY: Final = "traced"
SEQ2SEQ_WAY: Final = "traced encoder-decoder"

#: Encoder-decoders whose traced graphs are tested. They read text on both sides, and transformers keeps the caches of
#: all of them alike.
_SEQ2SEQ: Final = ("t5", "mt5", "umt5", "bart")
#: The model files of an encoder-decoder, under the names that Optimum and transformers.js look for.
_HALVES: Final = Precision("fp32", ("encoder_model", "decoder_model_merged"), "F32")


@dataclass(frozen=True)
class TracedLayout:
    """The merged checkpoint that will be traced, and what lies beside the graphs.

    stems: of the model files. reason: why the model is traced.
    """

    checkpoint: HfLayout
    files: dict[str, bytes]
    stems: tuple[str, ...]
    reason: str

    @property
    def way(self) -> str:
        """Which way to the graphs is taken."""
        return SEQ2SEQ_WAY if len(self.stems) > 1 else DECODER_WAY

    @property
    def nbytes(self) -> int:
        """Bytes of all weights: each graph holds each of its weights once, and each looks tokens up."""
        model = self.checkpoint.model
        twice = {*model.tie.copies, *([model.tie.head] if model.tie.tied and model.tie.head else [])}
        once = sum(spec.nbytes for name, spec in model.specs.items() if name not in twice)
        return once + (len(self.stems) - 1) * model.specs[model.tie.embedding].nbytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of this way."""
        return (f"{self.reason}: traced by torch.onnx.export, with the whole model in memory", "no genai_config.json")


def plan_traced(model: MergedModel, refusal: NotExpressible) -> TracedLayout:
    """Lay out the checkpoint to trace. refusal: why no family describes the model.

    Raises MissingDependency, or NotExpressible for encoder-decoders that are not known to work.
    """
    halves = PRECISIONS["fp32"]
    if model.config.get("is_encoder_decoder"):
        halves = _HALVES
        if (kind := model.config.get("model_type")) not in _SEQ2SEQ:
            known = ", ".join(_SEQ2SEQ)
            reason = f"the encoder-decoder {kind!r} is not traced by this version, which knows {known}"
            raise NotExpressible("onnx", reason, instead="--to hf holds it")
    for package in TRACE:
        package.require("a model without a family of its own")
    files = client_files(model, None, (halves,))
    return TracedLayout(plan_hf(model), files, halves.stems, refusal.reason)


def write_traced(layout: TracedLayout, out: Path, progress: Progress = silent) -> None:
    """Write the folder ``out``. Memory and time: the tracing process's.

    Raises OutputError, and NotExpressible with the last line of a tracing process that failed.
    """
    checkpoint = out.with_name(f"{out.name}-checkpoint")
    with writing(out):
        (out / FOLDER).mkdir(parents=True)
    try:
        write_hf(layout.checkpoint, checkpoint, progress)
        _trace(checkpoint, out / FOLDER, layout)
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
    for name, content in sorted(layout.files.items()):
        write_file(out / name, content)


def _trace(checkpoint: Path, folder: Path, layout: TracedLayout) -> None:
    metadata = {f"ttexport.{key}": value for key, value in sorted(layout.checkpoint.model.provenance.items())}
    arguments = (str(checkpoint), str(folder), json.dumps(metadata))
    if reason := failure("exporter.formats.onnx.trace.decoder", *arguments, environment={**os.environ, **OFFLINE}):
        raise NotExpressible("onnx", f"torch.onnx.export failed on this model: {reason}", instead="--to hf holds it")
    for path in (folder / f"{stem}{suffix}" for stem in layout.stems for suffix in (MODEL_SUFFIX, DATA_SUFFIX)):
        if not path.is_file():
            raise UnreadableFile(path, "expected the traced model, found no such file")
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
