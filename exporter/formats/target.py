"""One artifact to write: its format's own plan, or the reason why the format cannot hold the model."""

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

#: ``dtype`` as users write it → safetensors spelling.
DTYPES: Final = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def dtype_option() -> Any:
    """The field ``dtype``, which every format has."""
    return option(None, "Storage of unquantised tensors; default: as in the base.", choices=tuple(DTYPES))


@dataclass(frozen=True, kw_only=True)
class FormatOptions(Options):
    """Options of one format; ``section`` is the format's name."""

    def artifacts(self) -> Sequence[Self]:
        """One group of options for each requested artifact."""
        return (self,)

    def whole(self) -> Self:
        """The options without those that act on the finished artifact, such as limits of its parts."""
        return self

    @property
    def label(self) -> str:
        """The requested storage, in a word or two: a dtype, a quantisation, precisions."""
        raise NotImplementedError


class Scratch(Protocol):
    """Intermediate files shared by several artifacts."""

    def file(self, name: str, write: Callable[[Path], None]) -> tuple[Path, bool]:
        """(the file ``name``, whether it existed before). ``write`` makes it if it is missing."""


@dataclass(frozen=True)
class FolderScratch:
    """Scratch files of one run, in a folder that exists."""

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
    """Scratch files in a hidden folder beside ``out``, removed at the end. Raises OutputError."""
    folder = out.with_name(f".{out.name}.scratch")
    with writing(folder):
        folder.mkdir()
    try:
        yield FolderScratch(folder)
    finally:
        rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Target:
    """An artifact that can be written, or ``refusal``: why it cannot.

    write: makes the whole artifact at a path. finish: a last step, such as a split into parts; it may leave files
    beside the path, named after it. notes: sentences on properties of the model that the format cannot represent.
    nbytes: the size, an estimate if ``estimated``. work_nbytes: all bytes written to make it, if more. peak_nbytes:
    estimated peak memory of writing it. maker: the program or method that writes it, for a format with several. place:
    path below OUT; empty: OUT.
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
        """Write and finish the artifact. Raises ``refusal`` if there is one, and what the format's writer raises."""
        if self.refusal:
            raise self.refusal
        assert self.write is not None, "a target without a refusal can be written"
        self.write(path, progress, scratch)
        if self.finish:
            self.finish(path, progress)

    def to_json(self) -> dict[str, Any]:
        """The target in ``plan --json``, without its name and place."""
        return {
            "expressible": self.refusal is None,
            "reason": str(self.refusal) if self.refusal else None,
            "nbytes": self.nbytes,
            "peak_nbytes": self.peak_nbytes,
            "estimated": self.estimated,
            "maker": self.maker,
            "notes": list(self.notes),
        }
