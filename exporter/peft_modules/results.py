"""The weights that a process with PEFT computes for the modules of an adapter, as tensors that are read on demand."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, OutputError
from exporter.io.processes import OFFLINE, failure
from exporter.packages import PEFT
from exporter.sources.hf.safetensors import FileTensor, read_tensors
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.types.changes import ByPeft
from exporter.tensors import Array, ByteRange, TensorSpec

#: Readers in several threads start the process once.
_LOCK: Final = threading.Lock()


@dataclass
class Results:
    """The computed parameters of all modules that an adapter changes by PEFT.

    process: the module whose ``main`` computes the parameters. nbytes: size of all results in bytes. The process starts
    on first use. The results are in a temporary folder, which is removed with the last reference to ``Results``.
    """

    checkpoint: Path
    adapter: Path
    process: str
    nbytes: int = 0
    _files: list[dict[str, FileTensor]] = field(default_factory=list)

    def tensor(self, number: int, parameter: str) -> FileTensor:
        """Return ``parameter`` of the module of change ``number`` of the adapter.

        Raises BadInput if PEFT cannot apply the adapter, OutputError if the temporary folder has too little space, and
        MissingDependency if PEFT is not installed.
        """
        with _LOCK:
            if not self._files:
                self._compute()
        return self._files[number][parameter]

    def _compute(self) -> None:
        PEFT.require("--via peft")
        folder = Path(tempfile.mkdtemp(prefix="ttexport-peft-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        if self.nbytes > (free := shutil.disk_usage(folder).free):
            raise OutputError(folder, f"the merged modules need {self.nbytes} bytes, but only {free} bytes are free")
        environment = {**os.environ, **OFFLINE, "TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        paths = (str(self.checkpoint), str(self.adapter), str(folder))
        if reason := failure(self.process, *paths, environment=environment):
            raise BadInput(f"{self.adapter}: expected an adapter that PEFT can apply to the base, found: {reason}")
        count = len(list(folder.iterdir()))
        self._files = [read_tensors(_file(folder, number)) for number in range(count)]


@dataclass(frozen=True)
class ResultTensor(FileTensor):
    """A parameter of ``results`` that is computed on first use."""

    results: Results
    number: int
    parameter: str

    @classmethod
    def of(
        cls, results: Results, number: int, parameter: str, change: ByPeft, dtype: str, shape: tuple[int, ...]
    ) -> ResultTensor:
        """Return ``parameter`` of change ``number``, with the name and the file of the change's first tensor."""
        spec = TensorSpec(change.key, dtype, shape)
        results.nbytes += spec.nbytes
        return cls(spec, ByteRange(change.path, 0, spec.nbytes), results=results, number=number, parameter=parameter)

    def rows(self, start: int, stop: int) -> Array:
        """Return the rows [start, stop)."""
        return self._tensor.rows(start, stop)

    def segments(self) -> Iterator[ByteRange | Array]:
        """Yield the computed parameter as one range of a temporary file."""
        return self._tensor.segments()

    @property
    def _tensor(self) -> FileTensor:
        return self.results.tensor(self.number, self.parameter)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"


def serve(compute: Callable[[Path, Path], Iterator[dict[str, Any]]]) -> None:
    """Write what ``compute`` yields for each module: the main function of a process that computes results.

    compute: a function of (checkpoint, adapter) that yields the parameters of each module as torch tensors by name.
    """
    import warnings

    from safetensors.torch import save_file

    warnings.simplefilter("ignore")  # the last line on stderr is reported as the reason for a failure
    checkpoint, adapter, folder = map(Path, sys.argv[1:])
    for number, parameters in enumerate(compute(checkpoint, adapter)):
        save_file(parameters, _file(folder, number))


def open_inputs(checkpoint: Path, adapter: Path) -> Any:
    """Return the opened checkpoint and adapter."""
    from exporter.sources.hf.checkpoint import Checkpoint

    return Checkpoint.open(checkpoint), Adapter.open(adapter, via_peft=True)
