"""A process that imports modules once and runs them in forked children, as ``python -m MODULE ARGUMENT ...`` would.

Usage: ``python -m tests.session.fork_server MODULE,MODULE,... [IMPORT ...]``. Each line of stdin is a job in JSON; its
exit code, as ``subprocess`` counts it, is a line of stdout. The first line is the number of threads after the imports:
a process may be forked safely while it has one.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module


def main(modules: Sequence[str], imports: Sequence[str]) -> None:
    """Serve until stdin ends. In a child, return or raise as the module of its job does."""
    for name in (*modules, *imports):
        import_module(name)
    for name in modules:
        del sys.modules[name]  # a child executes it anew, as __main__
    gc.collect()
    gc.freeze()  # else every child would copy the pages of all objects when it collects them at its end
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    print(len(os.listdir("/proc/self/task")), file=answers, flush=True)
    for line in jobs:
        child = os.fork()
        if not child:
            jobs.close()
            answers.close()
            _become(**json.loads(line))
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _become(
    module: str, arguments: Sequence[str], environment: dict[str, str], folder: str, stdout: str, stderr: str
) -> None:
    """Be the process that ``python -m module arguments`` is in ``folder``, with files for what it writes."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), (stdout, os.O_WRONLY), (stderr, os.O_WRONLY)]):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv, sys.path[0] = [module, *arguments], folder
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2:])
