"""Define planned artifacts. A planned artifact contains either the function that writes the artifact, or an error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, Final, Protocol, Self

from exporter.errors import NotExpressible, writing
from exporter.options import Options, option
from exporter.progress import Progress

#: User's spelling of a dtype → safetensors spelling.
DTYPES: Final = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def dtype_option() -> Any:
    """Return the dataclass field of the option ``dtype``, which every output format has."""
    return option(None, "Dtype of unquantised tensors. Default: the dtype in the base model.", choices=tuple(DTYPES))


@dataclass(frozen=True, kw_only=True)
class FormatOptions(Options, ABC):
    """Options of an output format. The class attribute ``section`` is the format's name."""

    def artifacts(self) -> Sequence[Self]:
        """Return one copy of the options for each requested artifact."""
        return (self,)

    def whole(self) -> Self:
        """Return a copy of the options without those that act on the finished artifact, such as the split of a GGUF."""
        return self

    def as_released(self) -> Self:
        """Return the options with which a release writes the artifact."""
        return self

    def recipe_files(self) -> dict[str, Path]:
        """Map a name to each file that determines the bytes of the artifact and that the options choose."""
        return self.files()

    @property
    @abstractmethod
    def label(self) -> str:
        """A short text that names the requested storage: a dtype, a quantisation type, or several precisions."""


class Scratch(Protocol):
    """Temporary files of a run, such as an unquantised GGUF, which can be used for several artifacts."""

    def file(self, name: str, write: Callable[[Path], None]) -> tuple[Path, bool]:
        """Return (path of the temporary file ``name``, whether the file already existed).

        If the temporary file is missing, the function ``write`` is called to create the file.
        """


@dataclass(frozen=True)
class FolderScratch:
    """Temporary files of a run, stored in an existing folder."""

    folder: Path

    def file(self, name: str, write: Callable[[Path], None]) -> tuple[Path, bool]:
        """Return (path of the temporary file ``name``, whether the file already existed), as ``Scratch.file`` does."""
        path = self.folder / name
        if path.exists():
            return path, True
        write(path)
        return path, False


@contextmanager
def scratch_beside(out: Path) -> Iterator[FolderScratch]:
    """Provide temporary files in a hidden folder beside ``out``, and remove the folder at the end.

    Raises OutputError if the hidden folder cannot be created.
    """
    folder = out.with_name(f".{out.name}.scratch")
    with writing(folder):
        folder.mkdir()
    try:
        yield FolderScratch(folder)
    finally:
        rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A planned artifact. If the artifact cannot be written, ``refusal`` is the error that contains the reason.

    write: a function that writes the artifact to a path. finish: a function for a last step, such as cutting a GGUF
    into parts. The function may create files beside the artifact if their names start with the artifact's name. notes:
    sentences about properties of the model that the format cannot represent. nbytes: the artifact's size in bytes,
    which is an estimate if ``estimated`` is True. work_nbytes: the number of bytes written to make the artifact and its
    temporary files, or None if equal to ``nbytes``. peak_nbytes: the estimated peak memory of writing the artifact, in
    bytes. prefix: text before the usual file name of an artifact of the format. maker: the program or method that
    writes the artifact, for a format with several writers. place: the path of the artifact relative to the output
    folder, or an empty path if the artifact itself is the output.
    """

    format: str
    storage: str
    nbytes: int = 0
    work_nbytes: int | None = None
    peak_nbytes: int = 0
    estimated: bool = False
    write: Callable[[Path, Progress, Scratch], None] | None = None
    finish: Callable[[Path, Progress], object] | None = None
    refusal: NotExpressible | None = None
    notes: Sequence[str] = ()
    maker: str | None = None
    prefix: str = ""
    place: str = ""

    def make(self, path: Path, progress: Progress, scratch: Scratch) -> None:
        """Write the artifact, then run ``finish``.

        Raises the error in ``refusal``, if there is one, and the errors of the format's writer.
        """
        if self.refusal:
            raise self.refusal
        assert self.write is not None, "expected a write function or a refusal in the target, found neither"
        self.write(path, progress, scratch)
        if self.finish:
            self.finish(path, progress)

    def to_json(self) -> dict[str, Any]:
        """Return the target's entry in the output of ``plan --json``, without the artifact's name and path."""
        return {
            "expressible": self.refusal is None,
            "reason": str(self.refusal) if self.refusal else None,
            "nbytes": self.nbytes,
            "peak_nbytes": self.peak_nbytes,
            "estimated": self.estimated,
            "maker": self.maker,
            "notes": list(self.notes),
        }
