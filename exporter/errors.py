"""Every error that ttexport raises deliberately.

Each branch of the tree has its own exit code.

    TTExportError            1  unexpected
    ├── UsageError           2  the command line contradicts itself
    ├── NotEquivalent        3  an artifact failed verification; nothing was promoted
    ├── BadInput             4  an input file is broken, or two input files do not fit together
    │   ├── UnreadableFile       a file cannot be opened or parsed, or is cut short
    │   ├── TensorMismatch       a tensor does not fit the tensor that it belongs to
    │   └── LedgerError          a tensor would be dropped or applied twice
    ├── NotExpressible       5  the request cannot be represented in the target format, or in this version
    ├── MissingDependency    6  an optional package is absent
    └── OutputError          7  the output cannot be written: no space, no permission, or the output exists

A message is one line with the file, the tensor, the expected value and the actual value. Callers read the attributes of
an error and never parse its message.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TTExportError(Exception):
    """Base class of all errors of ttexport. ``exit_code`` is the exit code of the process for this branch of errors."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error with its attributes, because unpickling does not call the constructors."""
        return _revive, (type(self), self.args, self.__dict__)


def _revive(cls: type[TTExportError], args: tuple[object, ...], attributes: Mapping[str, object]) -> TTExportError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(attributes)
    return error


class UsageError(TTExportError):
    """The options contradict each other or name something that does not exist."""

    exit_code = 2


class NotEquivalent(TTExportError):
    """An artifact differs from its reference by more than the tolerance of a check."""

    exit_code = 3

    def __init__(self, verdict: str, document: Mapping[str, object]) -> None:
        """``verdict`` is the line to print. ``document`` is the whole report, for callers that read JSON."""
        super().__init__(verdict)
        self.document = document


class BadInput(TTExportError):
    """An input file or folder cannot be used unchanged."""

    exit_code = 4
    path: Path | None

    def __init__(self, message: str, *, path: Path | str | None = None) -> None:
        """``path`` is the file that ``message`` names, or None if only the caller knows the file."""
        super().__init__(message)
        self.path = None if path is None else Path(path)


class UnreadableFile(BadInput):
    """A file is missing, cut short, or of another format than expected."""

    path: Path

    def __init__(self, path: Path | str, reason: str) -> None:
        """``reason`` is the part of the message after the path and a colon."""
        super().__init__(f"{path}: {reason}", path=path)
        self.reason = reason


class TensorMismatch(BadInput):
    """A tensor has a shape, a dtype, ids or values that do not fit its use."""

    def __init__(self, path: Path | str, tensor: str, *, expected: object, found: object, hint: str = "") -> None:
        """``expected`` and ``found`` are printed unchanged. ``hint`` is the likely cause or the remedy."""
        tail = f" ({hint})" if hint else ""
        super().__init__(f"{path}: {tensor}: expected {expected}, found {found}{tail}", path=path)
        self.tensor = tensor
        self.expected = expected
        self.found = found


class LedgerError(BadInput):
    """A tensor is taken by no rule, or by more than one rule."""

    def __init__(self, path: Path | str, tensor: str, *, expected: object, found: object) -> None:
        """``expected`` and ``found`` name the rules."""
        super().__init__(f"{path}: {tensor}: expected {expected}, found {found}", path=path)
        self.tensor = tensor


class NotExpressible(TTExportError):
    """A valid request cannot be represented in the target format."""

    exit_code = 5

    def __init__(self, target: str, reason: str, *, instead: str = "") -> None:
        """``target`` is the format or the command. ``instead`` names an alternative that works."""
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
    """The output cannot be written. The final name of the output stays unused."""

    exit_code = 7

    def __init__(self, path: Path | str, reason: str) -> None:
        """``reason`` is the part of the message after the path and a colon."""
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


def foreign_line(exc: BaseException, line: int | None = None, *, max_chars: int | None = None) -> str:
    """The message of another package's error as one line, or the name of the error's class if the message is empty.

    line: index of the line to use, such as -1 for the last line, or None to join all lines.
    """
    lines = [" ".join(text.split()) for text in str(exc).splitlines() if text.strip()]
    message = " ".join(lines) if line is None or not lines else lines[line]
    return message[:max_chars] or type(exc).__name__


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Translate OSError from reading ``path`` to ``UnreadableFile``."""
    try:
        yield
    except FileNotFoundError as exc:
        raise UnreadableFile(path, "no such file") from exc
    except OSError as exc:
        raise UnreadableFile(path, exc.strerror or str(exc)) from exc


@contextmanager
def in_tensor(path: Path, tensor: str) -> Iterator[None]:
    """Prefix the message of a ``BadInput`` that names no file with ``path`` and ``tensor``."""
    try:
        yield
    except BadInput as exc:
        if exc.path is not None:
            raise
        raise BadInput(f"{path}: {tensor}: {exc}", path=path) from exc


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate OSError from writing ``path`` to ``OutputError``."""
    try:
        yield
    except OSError as exc:
        reason = "no space left on the device" if exc.errno in (errno.ENOSPC, errno.EDQUOT) else exc.strerror
        raise OutputError(path, reason or str(exc)) from exc
