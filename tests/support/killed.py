"""Commands in forked processes, some of which kill themselves at their n-th file event in a folder.

``python -m tests.support.killed FOLDER MODULE...`` imports the modules, so that no fork imports them again, and reads
lines of JSON: {"function": "module:name", "arguments": […], "kill_at": n or null}. The function takes the arguments as
one list and returns an exit code. The answer to each line is {"code": …, "events": …}; code is negative for a signal.
Python reports each file that is opened, made, renamed or removed before it happens (an audit hook), so the moment of
the kill does not depend on a clock.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.support.processes import ENV, ROOT

COMMAND: Final = "exporter.cli.main:run"
EVENTS: Final = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"})


@contextmanager
def killer(folder: Path, *modules: str) -> Iterator[Killer]:
    """A process that forks for each command; it ends with the body. modules: imported before the first fork."""
    command = [sys.executable, "-m", "tests.support.killed", str(folder), *modules]
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

    def run(self, *arguments: object, kill_at: int | None = None, function: str = COMMAND) -> tuple[int, int]:
        """(exit code, or the signal as a negative number; number of events, 0 if the process was killed)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"function": function, "arguments": list(map(str, arguments)), "kill_at": kill_at}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["events"]


def main(folder: str, modules: Sequence[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _work(folder, function, request, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            events = pipe.read()
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "events": int(events or 0)}), flush=True)


def _work(folder: str, function: Callable[[list[str]], int], request: dict[str, Any], pipe: int) -> None:
    """In the fork: never returns."""
    events = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal events
        if event in EVENTS and _inside(folder, args):
            events += 1
            if events == request["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    sys.addaudithook(hook)
    code = function(request["arguments"])
    os.write(pipe, str(events).encode())
    os._exit(code)


def _inside(folder: str, args: tuple[Any, ...]) -> bool:
    """A path below the folder, or one relative to an open folder, as when a tree is removed."""
    path = args[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    name = os.fsdecode(path)
    return name.startswith(folder) or (not name.startswith("/") and isinstance(args[-1], int) and args[-1] > 2)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
