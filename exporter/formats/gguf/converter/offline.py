"""Run a Python script as a program without network: ``python -P offline.py SCRIPT ARGUMENT ...``.

All connections except Unix sockets are refused. The file is run by its path, so that the script's process imports
nothing of ttexport.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        raise PermissionError("the converter runs without network")


if __name__ == "__main__":
    sys.addaudithook(_refuse)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
