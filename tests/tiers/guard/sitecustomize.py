"""Refuses the packages that run models, in this process and in those that it starts.

Python imports ``sitecustomize`` at its start from the folders of PYTHONPATH, where ``install`` puts this one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Final

_FOLDER: Final = str(Path(__file__).parent)
#: Packages that a quick test does not import.
HEAVY: Final = ("torch", "transformers", "peft", "onnxruntime", "llama_cpp")


class NotQuick(BaseException):
    """A quick test imported a package that runs models. No Exception, so that no fallback for missing ones hides it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} by a quick test; the marker or fixture `models` takes it out of make quick")


class _Refusal(Loader):
    def exec_module(self, module: ModuleType) -> None:
        raise NotQuick(f"{module.__name__} was imported")


class _Guard(MetaPathFinder):
    """Finds installed packages, as ``importlib.util.find_spec`` has to, and loads none of the heavy ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in HEAVY else None
        if spec is not None:
            spec.loader = _Refusal()
        return spec


def install() -> None:
    """Guard this process and, through the environment, the Python processes that it starts."""
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())
    os.environ.update(unguarded(os.environ))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_FOLDER, os.environ["PYTHONPATH"]]))


def unguarded(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` for a process that may import all packages."""
    folders = environment.get("PYTHONPATH", "").split(os.pathsep)
    return {**environment, "PYTHONPATH": os.pathsep.join(folder for folder in folders if folder != _FOLDER)}


if __name__ == "sitecustomize":
    install()
