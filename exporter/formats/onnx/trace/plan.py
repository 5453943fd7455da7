"""Export models of families that ttexport does not know, by tracing with torch.onnx in a separate process.

The merged checkpoint is first written to disk, so that transformers can load the model in the tracing process. Traced
ONNX models use the same input names and file names as the ONNX models of built-in families. Tracing takes minutes, and
loads the whole model into memory with transformers.
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

#: Names of the tracing makers in the output of ``plan``.
_DECODER_MAKER: Final = "traced"
_SEQ2SEQ_MAKER: Final = "traced encoder-decoder"

#: Model types of encoder-decoders with tested traces. Encoder and decoder take text, and the KV caches of all four
#: types have a common form in transformers.
_SEQ2SEQ: Final = ("t5", "mt5", "umt5", "bart")
#: Model files of an encoder-decoder, with the file names that Optimum and transformers.js expect.
_HALVES: Final = Precision("fp32", ("encoder_model", "decoder_model_merged"), "F32")


@dataclass(frozen=True)
class TracedLayout:
    """The plan of a traced export: the merged checkpoint to trace, and the config and tokenizer files.

    stems: file name stems of the ONNX models. reason: why ttexport cannot build the graph without tracing.
    """

    checkpoint: HfLayout
    files: dict[str, bytes]
    stems: tuple[str, ...]
    reason: str

    @property
    def maker(self) -> str:
        """Name of the tracing method, as shown by ``ttexport plan``."""
        return _SEQ2SEQ_MAKER if len(self.stems) > 1 else _DECODER_MAKER

    @property
    def nbytes(self) -> int:
        """Size of all exported weights in bytes.

        Each weight is written once, except the embedding, which is written once per ONNX model.
        """
        model = self.checkpoint.model
        once = sum(spec.nbytes for name, spec in model.specs.items() if name not in model.tie.duplicates)
        return once + (len(self.stems) - 1) * model.specs[model.tie.embedding].nbytes

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the limits of traced models."""
        method = f"{self.reason}, so torch.onnx.export traces the model, which loads the whole model into memory"
        return method, "the ONNX folder contains no genai_config.json, so onnxruntime-genai cannot load the folder"


def plan_traced(model: MergedModel, refusal: NotExpressible) -> TracedLayout:
    """Plan a traced export of ``model``. refusal: the error with the reason why the model must be traced.

    Raises MissingDependency if torch, transformers or onnxscript is not installed. Raises NotExpressible for an
    encoder-decoder model whose model type has not been tested.
    """
    halves = PRECISIONS["fp32"]
    if model.config.get("is_encoder_decoder"):
        halves = _HALVES
        if (model_type := model.config.get("model_type")) not in _SEQ2SEQ:
            known = ", ".join(_SEQ2SEQ)
            reason = f"encoder-decoder models of type {model_type!r} are not supported (supported types: {known})"
            raise NotExpressible("onnx", reason, instead="use --to hf to export this model")
    for package in TRACE:
        package.require("ONNX export of a model family without built-in support")
    files = client_files(model, None, (halves,))
    return TracedLayout(plan_hf(model), files, halves.stems, refusal.reason)


def write_traced(layout: TracedLayout, out: Path, progress: Progress = silent) -> None:
    """Write the traced models to the folder ``out``.

    Most of the time and the peak memory are needed by the separate process that traces the model. Raises OutputError if
    a write fails. Raises NotExpressible if the tracing process fails; the message contains the last line of the
    process's stderr.
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
        raise NotExpressible(
            "onnx", f"torch.onnx.export failed on this model: {reason}", instead="use --to hf to export this model"
        )
    for path in (folder / f"{stem}{suffix}" for stem in layout.stems for suffix in (MODEL_SUFFIX, DATA_SUFFIX)):
        if not path.is_file():
            raise UnreadableFile(path, "expected the traced model, but the file does not exist")
        sync_file(path)
