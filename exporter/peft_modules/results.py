"""Reads weights that PEFT computes in a separate process. The process starts when a weight is first read."""

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


@dataclass(eq=False)
class Results:
    """The parameters that PEFT computes for all modules that an adapter changes.

    process: the Python module that computes the parameters in a new process. nbytes: size of all computed parameters in
    bytes. The process starts when the first parameter is read. The computed parameters are stored in a temporary
    folder, which is removed when the ``Results`` object is garbage-collected. Instances are compared by identity, so
    that caches can use tensors of the results as keys.
    """

    checkpoint: Path
    adapter: Path
    process: str
    nbytes: int = 0
    _files: list[dict[str, FileTensor]] = field(default_factory=list)

    def tensor(self, number: int, parameter: str) -> FileTensor:
        """Return the computed parameter ``parameter`` of the module that the adapter's change ``number`` changes.

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
    """A parameter that PEFT computes in a separate process when the parameter is first read."""

    results: Results
    number: int
    parameter: str

    @classmethod
    def of(
        cls, results: Results, number: int, parameter: str, change: ByPeft, dtype: str, shape: tuple[int, ...]
    ) -> ResultTensor:
        """Create the parameter ``parameter`` of change ``number``.

        Error messages name the first adapter tensor of the change.
        """
        spec = TensorSpec(change.key, dtype, shape)
        results.nbytes += spec.nbytes
        return cls(spec, ByteRange(change.path, 0, spec.nbytes), results=results, number=number, parameter=parameter)

    def rows(self, start: int, stop: int) -> Array:
        """Return the rows [start, stop)."""
        return self._tensor.rows(start, stop)

    def segments(self) -> Iterator[ByteRange | Array]:
        """Yield the computed parameter as a single byte range of a temporary file."""
        return self._tensor.segments()

    @property
    def _tensor(self) -> FileTensor:
        return self.results.tensor(self.number, self.parameter)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"


def serve(compute: Callable[[Path, Path], Iterator[dict[str, Any]]]) -> None:
    """Run ``compute`` as the main function of a process, and save the tensors of each module to a file.

    compute: a function with the arguments (checkpoint path, adapter path) that yields, for each module, a dict from
    parameter names to torch tensors.
    """
    import warnings

    from safetensors.torch import save_file

    warnings.simplefilter("ignore")  # the last line on stderr is reported as the reason for a failure
    checkpoint, adapter, folder = map(Path, sys.argv[1:])
    for number, parameters in enumerate(compute(checkpoint, adapter)):
        save_file(parameters, _file(folder, number))


def open_inputs(checkpoint: Path, adapter: Path) -> Any:
    """Open the checkpoint and the adapter, and return both objects."""
    from exporter.sources.hf.checkpoint import Checkpoint

    return Checkpoint.open(checkpoint), Adapter.open(adapter, via_peft=True)
