"""Refuses the packages that run models, in this process and in those that it starts.

Python imports ``sitecustomize`` at its start from the folders of PYTHONPATH, where ``install`` puts this one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Final

#: Packages that a quick test does not import.
HEAVY: Final = ("torch", "transformers", "peft", "onnxruntime", "llama_cpp")


class HeavyImport(BaseException):
    """A quick test imported a package that runs models. No Exception, so that no fallback for missing ones hides it."""


class _Refusal(Loader):
    def exec_module(self, module: ModuleType) -> None:
        raise HeavyImport(
            f"{module.__name__} imported by a quick test: tests/tiers/quick.py says which tests are quick, "
            "the marker `models` takes one out"
        )


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
    folders = [str(Path(__file__).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folders))


if __name__ == "sitecustomize":
    install()
