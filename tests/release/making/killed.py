"""Commands in forked processes, of which some kill themselves at their n-th event in a folder.

``python -m tests.release.making.killed FOLDER`` reads lines of JSON: {"words": […], "kill_at": n or null}; it answers
each with {"code": …, "events": …}, code being negative for a signal. Python tells of each file that is opened, made,
renamed or removed before it happens: no clock has a say in where a process ends. What the parent imported needs no
second import.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from exporter.cli.main import run
from tests.processes import ENV, ROOT

EVENTS: Final = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"})
_USED: Final = (
    "exporter.cli.verbs.release",
    "exporter.formats.gguf.plan",
    "exporter.formats.gguf.stream",
    "exporter.formats.hf.write",
    "exporter.formats.onnx.write",
    "exporter.sources.onnx.file",
    "gguf",
    "huggingface_hub",
    "jinja2",
)


@contextmanager
def killer(folder: Path) -> Iterator[Killer]:
    """The process that forks; it ends with the body."""
    command = [sys.executable, "-m", "tests.release.making.killed", str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV, cwd=ROOT
    ) as process:
        yield Killer(process)
        assert process.stdin is not None
        process.stdin.close()


class Killer:
    """Runs commands, one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, *words: object, kill_at: int | None = None) -> tuple[int, int]:
        """(exit code, or the signal as a negative number; events that it came to)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"words": list(map(str, words)), "kill_at": kill_at}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["events"]


def main(folder: str) -> None:
    for name in _USED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _work(folder, asked, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            told = pipe.read()
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "events": int(told or 0)}), flush=True)


def _work(folder: str, asked: dict[str, Any], pipe: int) -> None:
    """In the fork: never returns."""
    events = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal events
        if event in EVENTS and _inside(folder, args):
            events += 1
            if events == asked["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    sys.addaudithook(hook)
    code = run(asked["words"])
    os.write(pipe, str(events).encode())
    os._exit(code)


def _inside(folder: str, args: tuple[Any, ...]) -> bool:
    """A path below the folder, or one that is relative to a folder that is open: a tree that is being removed."""
    path = args[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    name = os.fsdecode(path)
    return name.startswith(folder) or (not name.startswith("/") and isinstance(args[-1], int) and args[-1] > 2)


if __name__ == "__main__":
    main(sys.argv[1])
