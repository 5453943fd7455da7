"""ONNX of a model that no family describes: traced by torch.onnx in a separate process.

The merged checkpoint is written first, for transformers to read; the traced graphs get the names and the layout of the
graphs built from descriptions. Cost: the whole model in memory, as transformers loads it, and minutes.
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
from exporter.io.staging import sync_file, write_file
from exporter.merge.model import MergedModel
from exporter.packages import TRACE
from exporter.progress import Progress, silent

#: Names of these makers in the output of ``plan``.
_DECODER_MAKER: Final = "traced"
_SEQ2SEQ_MAKER: Final = "traced encoder-decoder"

#: Encoder-decoders with tested traces. They take text on both sides, and their caches have the same form in
#: transformers.
_SEQ2SEQ: Final = ("t5", "mt5", "umt5", "bart")
#: The model files of an encoder-decoder, under the names that Optimum and transformers.js expect.
_HALVES: Final = Precision("fp32", ("encoder_model", "decoder_model_merged"), "F32")


@dataclass(frozen=True)
class TracedLayout:
    """The merged checkpoint that will be traced, and the files beside the graphs.

    stems: of the model files. reason: why the model is traced.
    """

    checkpoint: HfLayout
    files: dict[str, bytes]
    stems: tuple[str, ...]
    reason: str

    @property
    def maker(self) -> str:
        """How the graphs are made."""
        return _SEQ2SEQ_MAKER if len(self.stems) > 1 else _DECODER_MAKER

    @property
    def nbytes(self) -> int:
        """Bytes of all weights. A graph holds each of its weights once, and every graph has the embedding."""
        model = self.checkpoint.model
        once = sum(spec.nbytes for name, spec in model.specs.items() if name not in model.tie.duplicates)
        return once + (len(self.stems) - 1) * model.specs[model.tie.embedding].nbytes

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on this maker."""
        return (f"{self.reason}: traced by torch.onnx.export, with the whole model in memory", "no genai_config.json")


def plan_traced(model: MergedModel, refusal: NotExpressible) -> TracedLayout:
    """Lay out the checkpoint to trace. refusal: why no family describes the model.

    Raises MissingDependency, or NotExpressible for encoder-decoders that are not tested.
    """
    halves = PRECISIONS["fp32"]
    if model.config.get("is_encoder_decoder"):
        halves = _HALVES
        if (model_type := model.config.get("model_type")) not in _SEQ2SEQ:
            known = ", ".join(_SEQ2SEQ)
            reason = f"this version does not trace the encoder-decoder {model_type!r}, only {known}"
            raise NotExpressible("onnx", reason, instead="--to hf can hold it")
    for package in TRACE:
        package.require("a model that no family describes")
    files = client_files(model, None, (halves,))
    return TracedLayout(plan_hf(model), files, halves.stems, refusal.reason)


def write_traced(layout: TracedLayout, out: Path, progress: Progress = silent) -> None:
    """Write the folder ``out``. Memory and time: those of the tracing process.

    Raises OutputError, and NotExpressible with the last line of a failed tracing process.
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
        raise NotExpressible("onnx", f"torch.onnx.export failed on this model: {reason}", instead="--to hf can hold it")
    for path in (folder / f"{stem}{suffix}" for stem in layout.stems for suffix in (MODEL_SUFFIX, DATA_SUFFIX)):
        if not path.is_file():
            raise UnreadableFile(path, "expected the traced model, found no such file")
        sync_file(path)
