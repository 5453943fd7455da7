"""Defines all errors that ttexport raises deliberately.

Each direct subclass of TTExportError has a separate exit code.

    TTExportError            1  unexpected
    ├── UsageError           2  options contradict each other, or name something that does not exist
    ├── NotEquivalent        3  an artifact failed verification; the output was not published
    ├── BadInput             4  an input file is invalid, or two input files do not fit together
    │   ├── UnreadableFile       a file cannot be opened or parsed, or is truncated
    │   ├── TensorMismatch       the shape, dtype or values of a tensor are wrong for its purpose
    │   └── LedgerError          no merge rule, or more than one, handles a tensor
    ├── NotExpressible       5  the target format or this version of ttexport does not support the request
    ├── MissingDependency    6  an optional package is absent
    └── OutputError          7  the output cannot be written: no space, no permission, or the output exists

An error message is a single line that names the file, the tensor, the expected value and the actual value. Code that
catches an error should read the attributes of the error and should not parse the message.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TTExportError(Exception):
    """Base class of all errors of ttexport.

    The class attribute ``exit_code`` is the exit code of the command ``ttexport`` after an error of the class.
    """

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error with its attributes, so that unpickling does not call the constructor of the class."""
        return _revive, (type(self), self.args, self.__dict__)


def _revive(cls: type[TTExportError], args: tuple[object, ...], attributes: Mapping[str, object]) -> TTExportError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(attributes)
    return error


class UsageError(TTExportError):
    """Raised if command-line options contradict each other or name something that does not exist."""

    exit_code = 2


class NotEquivalent(TTExportError):
    """Raised if an artifact differs from its reference by more than the tolerance of a check."""

    exit_code = 3

    def __init__(self, verdict: str, document: Mapping[str, object]) -> None:
        """The argument ``verdict`` is the error message, and ``document`` is the verification report as JSON data."""
        super().__init__(verdict)
        self.document = document


class BadInput(TTExportError):
    """Raised if an input file or folder is invalid or does not fit another input."""

    exit_code = 4
    path: Path | None

    def __init__(self, message: str, *, path: Path | str | None = None) -> None:
        """The argument ``path`` is the invalid file, or None if the raising code does not know which file it reads."""
        super().__init__(message)
        self.path = None if path is None else Path(path)


class UnreadableFile(BadInput):
    """Raised if a file is missing, truncated, or not in the expected format."""

    path: Path

    def __init__(self, path: Path | str, reason: str) -> None:
        """The argument ``reason`` is the part of the message after the path and a colon."""
        super().__init__(f"{path}: {reason}", path=path)
        self.reason = reason


class TensorMismatch(BadInput):
    """Raised if the shape, dtype, ids or values of a tensor are wrong for the purpose of the tensor."""

    def __init__(self, path: Path | str, tensor: str, *, expected: object, found: object, hint: str = "") -> None:
        """The arguments ``expected`` and ``found`` are printed unchanged; ``hint`` is the likely cause or a remedy."""
        tail = f" ({hint})" if hint else ""
        super().__init__(f"{path}: {tensor}: expected {expected}, found {found}{tail}", path=path)
        self.tensor = tensor
        self.expected = expected
        self.found = found


class LedgerError(BadInput):
    """Raised if no merge rule, or more than one merge rule, handles a tensor."""

    def __init__(self, path: Path | str, tensor: str, *, expected: object, found: object) -> None:
        """The arguments name the merge rules that should handle the tensor (``expected``) and that do (``found``)."""
        super().__init__(f"{path}: {tensor}: expected {expected}, found {found}", path=path)
        self.tensor = tensor


class NotExpressible(TTExportError):
    """Raised if a valid request cannot be represented in the target format."""

    exit_code = 5

    def __init__(self, target: str, reason: str, *, instead: str = "") -> None:
        """The argument ``target`` is the format or command that refuses the request; ``instead`` is an alternative."""
        super().__init__(f"{target}: {reason}" + (f"; {instead}" if instead else ""))
        self.target = target
        self.reason = reason
        self.instead = instead


class MissingDependency(TTExportError):
    """Raised if a required optional package is not installed."""

    exit_code = 6

    def __init__(self, package: str, *, needed_for: str, install: str) -> None:
        """The argument ``install`` is what the user must pass to ``pip install``."""
        super().__init__(f"{needed_for} needs {package}; run pip install '{install}'")
        self.package = package


class OutputError(TTExportError):
    """Raised if the output cannot be written."""

    exit_code = 7

    def __init__(self, path: Path | str, reason: str) -> None:
        """The argument ``reason`` is the part of the message after the path and a colon."""
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


def foreign_line(exc: BaseException, line: int | None = None, *, max_chars: int | None = None) -> str:
    """Return the message of an exception as one line, or the class name of the exception if the message is empty.

    line: index of the line of the message to return, such as -1 for the last line, or None to join all lines.
    """
    lines = [" ".join(text.split()) for text in str(exc).splitlines() if text.strip()]
    message = " ".join(lines) if line is None or not lines else lines[line]
    return message[:max_chars] or type(exc).__name__


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert an OSError to an ``UnreadableFile`` error if the OSError is raised while ``path`` is read."""
    try:
        yield
    except FileNotFoundError as exc:
        raise UnreadableFile(path, "no such file") from exc
    except OSError as exc:
        raise UnreadableFile(path, exc.strerror or str(exc)) from exc


@contextmanager
def in_tensor(path: Path, tensor: str) -> Iterator[None]:
    """If the ``with`` body raises a BadInput without a path, prefix its message with ``path`` and ``tensor``."""
    try:
        yield
    except BadInput as exc:
        if exc.path is not None:
            raise
        raise BadInput(f"{path}: {tensor}: {exc}", path=path) from exc


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError to an ``OutputError`` if the OSError is raised while ``path`` is written."""
    try:
        yield
    except OSError as exc:
        reason = "no space left on the device" if exc.errno in (errno.ENOSPC, errno.EDQUOT) else exc.strerror
        raise OutputError(path, reason or str(exc)) from exc
