"""Quantise an unquantised GGUF file with llama.cpp."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final, Protocol

from exporter.errors import NotExpressible, OutputError, TTExportError
from exporter.formats.gguf.quantisation.file_types import NEED_IMPORTANCES, FileType
from exporter.formats.gguf.quantisation.imatrix import read_imatrix
from exporter.formats.gguf.quantisation.tensor_types import estimated_nbytes
from exporter.formats.gguf.writer import TensorEntry
from exporter.io.staging import sync_file
from exporter.packages import LLAMA_CPP
from exporter.progress import Progress, silent

_WORKER: Final = "exporter.formats.gguf.quantisation.llama_quantize"


class QuantiserFailed(TTExportError):
    """Raised if llama.cpp's quantiser crashes without printing an error message."""


class Unquantised(Protocol):
    """The plan of an unquantised GGUF."""

    @property
    def entries(self) -> Sequence[TensorEntry]:
        """The entries of all tensors."""

    @property
    def header_nbytes(self) -> int:
        """Size in bytes of everything before the data section."""

    @property
    def nbytes(self) -> int:
        """Size of the whole GGUF in bytes."""


@dataclass(frozen=True, kw_only=True)
class QuantisedLayout:
    """The plan of a GGUF of the type ``file_type``, made by quantising the unquantised GGUF ``source``.

    The fields ``token_embedding_type`` and ``output_tensor_type`` contain the names of ggml types, or None if llama.cpp
    chooses the type of the tensor.
    """

    source: Unquantised
    file_type: FileType
    imatrix: Path | None = None
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Estimated size of the quantised file in bytes.

        The size is only estimated, because llama.cpp chooses the tensor types while writing the file.
        """
        sizes = [estimated_nbytes(self.file_type, entry.name, entry.shape) for entry in self.source.entries]
        return self.source.header_nbytes + sum(sizes)

    @property
    def work_nbytes(self) -> int:
        """Total size in bytes of the unquantised GGUF and the quantised GGUF."""
        return self.source.nbytes + self.nbytes


def plan_quantised(
    source: Unquantised,
    file_type: FileType,
    *,
    imatrix: Path | None = None,
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
) -> QuantisedLayout:
    """Plan a quantised GGUF, and check the requested file type and tensor types before llama.cpp runs.

    The types requested for individual tensors must be in ``SELECTABLE_TENSOR_TYPES``. Raises MissingDependency if
    llama-cpp-python is not installed, NotExpressible if a requested type needs an importance matrix that is not given,
    and UnreadableFile if the file of the importance matrix is broken.
    """
    LLAMA_CPP.require(f"--quant {file_type.name}")
    if file_type.needs_imatrix and imatrix is None:
        raise NotExpressible(
            f"gguf {file_type.name}",
            "quantising to this file type needs an importance matrix",
            instead="use --imatrix FILE to provide an importance matrix",
        )
    importances = read_imatrix(imatrix) if imatrix is not None else None
    for name, tensor_type in (("token_embd.weight", token_embedding_type), ("output.weight", output_tensor_type)):
        if tensor_type in NEED_IMPORTANCES:
            reason = f"quantising to {tensor_type} needs importances, and token rows are quantised without importances"
            raise NotExpressible(f"gguf: {name}", reason, instead="choose another type for this tensor")
    file = imatrix.name if imatrix else ""
    ignored = [
        f"{file}: the importances of {name} are not used, so that a patch can replace rows"
        for name in (importances.unused if importances else ())
    ]
    build = (
        f"quantised by llama-cpp-python {version('llama-cpp-python')}; other builds of llama.cpp may round differently"
    )
    return QuantisedLayout(
        source=source,
        file_type=file_type,
        imatrix=imatrix,
        token_embedding_type=token_embedding_type,
        output_tensor_type=output_tensor_type,
        notes=(build, *ignored),
    )


def write_quantised(layout: QuantisedLayout, source: Path, path: Path, progress: Progress = silent) -> None:
    """Quantise the unquantised GGUF ``source`` to the new file ``path``, as planned in ``layout``.

    Peak memory: a block of tensor rows, in the process that runs llama.cpp.
    Raises NotExpressible if llama.cpp refuses to quantise the GGUF (the message contains llama.cpp's reason),
    QuantiserFailed if llama.cpp crashes, and OutputError if the file cannot be written.
    """
    job = {
        "source": str(source),
        "target": str(path),
        "number": layout.file_type.number,
        "imatrix": str(layout.imatrix) if layout.imatrix else None,
        "token_embedding_type": layout.token_embedding_type,
        "output_tensor_type": layout.output_tensor_type,
    }
    file = path.with_name(f".{path.name}.job.json")
    file.write_text(json.dumps(job))
    try:
        _run(layout, file, path, progress)
        sync_file(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        file.unlink()


def _run(layout: QuantisedLayout, job: Path, path: Path, progress: Progress) -> None:
    """Run the quantiser's worker process and report the worker's progress.

    Raises an error if the worker process fails.
    """
    artifact = f"gguf {layout.file_type.name}"
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    with (
        open(os.devnull, "rb") as null,
        subprocess.Popen(
            [sys.executable, "-m", _WORKER, str(job)],
            stdin=null,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            reported = 0
            for line in process.stdout:
                done, count = map(int, line.split())
                reached = layout.nbytes * done // count
                progress(reached - reported)
                reported = reached
            errors = [line.strip() for line in process.stderr.read().splitlines() if line.strip()]
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return
    reason = (
        errors[-1].partition("failed to quantize: ")[2] or errors[-1] if errors else f"exit code {process.returncode}"
    )
    if "iostream error" in reason:
        raise OutputError(path, "llama.cpp could not write the file; check the free space on the device")
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise QuantiserFailed(f"{artifact}: llama.cpp's quantiser was terminated by {name}: {reason}")
    raise NotExpressible(artifact, f"llama.cpp refused to quantise the GGUF: {reason}")
