"""An artifact to write: the format's plan, or the reason why the format cannot represent the model."""

from __future__ import annotations

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
    """The option field ``dtype``, which every format has."""
    return option(None, "Dtype of unquantised tensors. Default: the dtype in the base.", choices=tuple(DTYPES))


@dataclass(frozen=True, kw_only=True)
class FormatOptions(Options):
    """Options of a format. The class attribute ``section`` is the format's name."""

    def artifacts(self) -> Sequence[Self]:
        """Split the options into a group for each requested artifact."""
        return (self,)

    def whole(self) -> Self:
        """The options without those options that act on the finished artifact, such as the size limit of GGUF parts."""
        return self

    def as_released(self) -> Self:
        """Return the options of one artifact as a job of a release uses them."""
        return self

    @property
    def label(self) -> str:
        """A short name of the requested storage: a dtype, a quantisation, or precisions."""
        raise NotImplementedError


class Scratch(Protocol):
    """Scratch files from which several artifacts of a run are made."""

    def file(self, name: str, write: Callable[[Path], None]) -> tuple[Path, bool]:
        """Return (path of the file ``name``, whether the file existed). ``write`` creates a missing file."""


@dataclass(frozen=True)
class FolderScratch:
    """Scratch files of a run, in an existing folder."""

    folder: Path

    def file(self, name: str, write: Callable[[Path], None]) -> tuple[Path, bool]:
        """See ``Scratch``."""
        path = self.folder / name
        if path.exists():
            return path, True
        write(path)
        return path, False


@contextmanager
def scratch_beside(out: Path) -> Iterator[FolderScratch]:
    """Provide scratch files in a hidden folder beside ``out``, and remove the folder at the end. Raises OutputError."""
    folder = out.with_name(f".{out.name}.scratch")
    with writing(folder):
        folder.mkdir()
    try:
        yield FolderScratch(folder)
    finally:
        rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A planned artifact, or a ``refusal`` with the reason why the artifact cannot be written.

    write: a function that writes the artifact to a path. finish: a function for a last step, such as the split of a
    GGUF into parts; the function may create files beside the path, named after the path. notes: sentences on properties
    of the model that the format cannot represent. nbytes: size of the artifact; an estimate if ``estimated``.
    work_nbytes: all bytes written to make the artifact, if more than ``nbytes``. peak_nbytes: estimated peak memory of
    writing the artifact. maker: the program or method that writes the artifact, for a format with several makers.
    place: path of the artifact below OUT; empty if the artifact is OUT itself.
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
    place: str = ""

    def make(self, path: Path, progress: Progress, scratch: Scratch) -> None:
        """Write and finish the artifact. Raises the ``refusal`` if given, and the errors of the format's writer."""
        if self.refusal:
            raise self.refusal
        assert self.write is not None, "a target without a refusal can be written"
        self.write(path, progress, scratch)
        if self.finish:
            self.finish(path, progress)

    def to_json(self) -> dict[str, Any]:
        """The target's entry in the output of ``plan --json``, without the artifact's name and place."""
        return {
            "expressible": self.refusal is None,
            "reason": str(self.refusal) if self.refusal else None,
            "nbytes": self.nbytes,
            "peak_nbytes": self.peak_nbytes,
            "estimated": self.estimated,
            "maker": self.maker,
            "notes": list(self.notes),
        }
