"""Explain why llama.cpp's converter failed, in terms of the checkpoint that the converter read.

The converter has hardly any messages of its own: what a checkpoint lacks ends the script with a KeyError or a failed
assertion. The traceback shows which part of the converter failed. If the part is the code that reads the tokenizer, the
tokenizer does not fit the converter's class for the model type.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, MissingDependency, NotExpressible, OutputError, TTExportError

_FRAME: Final = re.compile(r'^  File "(?P<file>.+)", line \d+, in (?P<function>.+)$')
_UNSUPPORTED: Final = re.compile(r"Model (\S+) is not supported$")
_MODULE: Final = re.compile(r"No module named '([\w.]+)'")
_FILE: Final = re.compile(r"File not found: (.+)$")
_IDS_BELOW_SIZE: Final = re.compile(r"assert max\(.*\) < vocab_size")
_OPTION: Final = (
    "use --to hf to keep the checkpoint's format, or ttexport patch to write token rows into an existing GGUF"
)


@dataclass(frozen=True)
class Failure:
    """A failed run of the converter. lines: the non-empty lines of the script's stderr."""

    script: Path
    base: Path
    architecture: str
    returncode: int
    lines: tuple[str, ...]

    @property
    def last(self) -> str:
        """The last line of stderr, which names the exception if the script raised one."""
        return self.lines[-1].strip() if self.lines else "no output on stderr"

    @property
    def functions(self) -> list[str]:
        """The names of the functions in the traceback, from the outermost call to the innermost call."""
        return [match["function"] for line in self.lines if (match := _FRAME.match(line))]

    @property
    def statement(self) -> str:
        """The statement that raised the exception, or an empty text."""
        frames = [number for number, line in enumerate(self.lines) if _FRAME.match(line)]
        after = self.lines[frames[-1] + 1 :] if frames else ()
        return after[0].strip() if len(after) > 1 else ""


def explained(failure: Failure) -> TTExportError:
    """Return the error to raise for a failed run of the converter.

    NotExpressible: the converter does not know the architecture or the pre-tokenizer. MissingDependency: a Python
    package is missing. OutputError: no space is left. BadInput: the checkpoint lacks something, or the cause is
    unknown; the message then contains the last line of stderr.
    """
    last, target = failure.last, f"gguf: {failure.base}"
    for line in failure.lines:
        if match := _UNSUPPORTED.search(line):
            reason = f"llama.cpp's converter does not support the architecture {match[1]}"
            return NotExpressible(target, reason, instead=_OPTION)
    if match := _MODULE.search(last):
        needed_for = f"llama.cpp's converter for {failure.architecture}"
        return MissingDependency(match[1], needed_for=needed_for, install=match[1])
    if "[Errno 28]" in last:
        return OutputError(failure.script, "no space left on the device while the converter ran")
    if "pre-tokenizer was not recognized" in last:
        reason = "expected a pre-tokenizer that this version of llama.cpp knows, found a tokenizer with another one"
        return NotExpressible(f"{target}: tokenizer", reason, instead=_OPTION)
    if any("vocab" in function for function in failure.functions):
        return BadInput(f"{failure.base}: tokenizer: {_lacking(failure)}", path=failure.base)
    if demand := _config_fault(failure):
        return BadInput(f"{failure.base}: config.json: {demand}", path=failure.base)
    return BadInput(f"{failure.script}: {_ending(failure)}: {last:.500}{_where(failure)}")


def _lacking(failure: Failure) -> str:
    """Say what the tokenizer lacks, given that the converter's code for tokenizers failed."""
    last, code = failure.last, failure.statement
    reader = f"llama.cpp's converter for {failure.architecture}"
    remedy = "use the tokenizer with which models of this type are published"
    if last.startswith("KeyError: "):
        name = last.removeprefix("KeyError: ")
        return f"expected the token {name}, which {reader} looks up, found a tokenizer without the token; {remedy}"
    if _IDS_BELOW_SIZE.match(code):
        return f"expected token ids below vocab_size of config.json, found a larger id, which {reader} refuses"
    if match := _FILE.search(last):
        return f"expected the file {Path(match[1]).name}, which {reader} reads, found none; {remedy}"
    return f"expected a tokenizer that {reader} can read, found one for which it ends with {last:.300}{_where(failure)}"


def _config_fault(failure: Failure) -> str | None:
    """Say what the converter's code for the config demands, or return None if other code failed."""
    reader = f"llama.cpp's converter for {failure.architecture}"
    if failure.last.startswith("KeyError: ") and "hparams" in failure.statement:
        return f"expected the key {failure.last.removeprefix('KeyError: ')}, which {reader} reads, found none"
    if failure.last == "AssertionError" and "set_gguf_parameters" in failure.functions:
        return f"expected {failure.statement.removeprefix('assert '):.300}, as {reader} demands, found other values"
    return None


def _ending(failure: Failure) -> str:
    if failure.returncode > 0:
        return f"exit status {failure.returncode}"
    if failure.returncode < 0:
        return f"terminated by {signal.Signals(-failure.returncode).name}"
    return "the converter script wrote no GGUF file"


def _where(failure: Failure) -> str:
    """Return the failed statement in parentheses if the exception has no message, as for most assertions."""
    return f" ({failure.statement:.300})" if failure.statement and ":" not in failure.last else ""
