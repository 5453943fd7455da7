"""Every error that ttexport raises on purpose; each branch has its exit code.

    TTExportError            1  unexpected
    ├── UsageError           2  the command line contradicts itself
    ├── NotEquivalent        3  an artifact failed its proof; nothing was promoted
    ├── BadInput             4  a file the user gave is broken, or two do not fit together
    │   ├── UnreadableFile       cannot be opened, parsed or is cut short
    │   ├── TensorMismatch       a tensor is not what its partner needs
    │   └── LedgerError          a tensor would be dropped or applied twice
    ├── NotExpressible       5  the target format, or this version, has no way to say it
    ├── MissingDependency    6  an optional package is absent
    └── OutputError          7  no space, no permission, or the output exists

Messages are one line: file, tensor, what was expected, what was found. Callers that need the parts read the
attributes; nobody parses the text.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TTExportError(Exception):
    """Root of the tree; ``exit_code`` is the process exit code of the branch."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with what it carries: constructors that take more than the message are not called again."""
        return _revive, (type(self), self.args, self.__dict__)


def _revive(kind: type[TTExportError], args: tuple[object, ...], carried: Mapping[str, object]) -> TTExportError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(carried)
    return error


class UsageError(TTExportError):
    """The options contradict each other or name something that is not there to choose."""

    exit_code = 2


class NotEquivalent(TTExportError):
    """An artifact differs from its reference by more than the tolerance of its gate."""

    exit_code = 3

    def __init__(self, verdict: str, document: Mapping[str, object]) -> None:
        """``verdict`` is the line to print; ``document`` the whole report, for callers that read JSON."""
        super().__init__(verdict)
        self.document = document


class BadInput(TTExportError):
    """An input cannot be used as it is."""

    exit_code = 4
    path: Path | None

    def __init__(self, message: str, *, path: Path | str | None = None) -> None:
        """``path`` is the file that ``message`` begins with; None for a fault in values whose file the caller knows."""
        super().__init__(message)
        self.path = None if path is None else Path(path)


class UnreadableFile(BadInput):
    """A file is missing, cut short, or not what its name says."""

    path: Path

    def __init__(self, path: Path | str, reason: str) -> None:
        """``path`` is the file; ``reason`` completes the sentence after the colon."""
        super().__init__(f"{path}: {reason}", path=path)
        self.reason = reason


class TensorMismatch(BadInput):
    """A tensor's shape, dtype, ids or values do not fit what they are to be used with."""

    def __init__(self, path: Path | str, tensor: str, *, expected: object, found: object, hint: str = "") -> None:
        """``expected`` and ``found`` are printed as they are; ``hint`` says what to do about it."""
        tail = f" ({hint})" if hint else ""
        super().__init__(f"{path}: {tensor}: expected {expected}, found {found}{tail}", path=path)
        self.tensor = tensor
        self.expected = expected
        self.found = found


class LedgerError(BadInput):
    """A tensor has no rule that takes it, or more than one."""

    def __init__(self, path: Path | str, tensor: str, *, expected: object, found: object) -> None:
        """``expected`` and ``found`` name the rules."""
        super().__init__(f"{path}: {tensor}: expected {expected}, found {found}", path=path)
        self.tensor = tensor


class NotExpressible(TTExportError):
    """The request is sound, but the target has no way to say it."""

    exit_code = 5

    def __init__(self, target: str, reason: str, *, instead: str = "") -> None:
        """``target`` is the format or verb; ``instead`` names what does work."""
        super().__init__(f"{target}: {reason}" + (f"; {instead}" if instead else ""))
        self.target = target
        self.reason = reason
        self.instead = instead


class MissingDependency(TTExportError):
    """An optional package is not installed."""

    exit_code = 6

    def __init__(self, package: str, *, needed_for: str, install: str) -> None:
        """``install`` is the argument of ``pip install``."""
        super().__init__(f"{needed_for} needs {package}; pip install '{install}'")
        self.package = package


class OutputError(TTExportError):
    """The output cannot be written; nothing is left at its final name."""

    exit_code = 7

    def __init__(self, path: Path | str, reason: str) -> None:
        """``reason`` completes the sentence after the colon."""
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Translate the operating system's complaints about an input file to ``UnreadableFile``."""
    try:
        yield
    except FileNotFoundError as exc:
        raise UnreadableFile(path, "no such file") from exc
    except OSError as exc:
        raise UnreadableFile(path, exc.strerror or str(exc)) from exc


@contextmanager
def in_tensor(path: Path, tensor: str) -> Iterator[None]:
    """Put file and tensor in front of a ``BadInput`` that names no file, such as that of a value out of range."""
    try:
        yield
    except BadInput as exc:
        if exc.path is not None:
            raise
        raise BadInput(f"{path}: {tensor}: {exc}", path=path) from exc


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate the operating system's complaints about an output to ``OutputError``."""
    try:
        yield
    except OSError as exc:
        reason = "no space left on the device" if exc.errno in (errno.ENOSPC, errno.EDQUOT) else exc.strerror
        raise OutputError(path, reason or str(exc)) from exc
