"""Finds optional Python packages, their versions, and the command that installs them. Imports no optional package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import MissingDependency


@dataclass(frozen=True, slots=True)
class Requirement:
    """Packages that one feature needs together.

    modules: import names of the packages.  title: the packages' names in messages.  install: the argument of ``pip
    install``.
    """

    modules: tuple[str, ...]
    title: str
    install: str

    def is_installed(self) -> bool:
        """Whether every module can be found. No module is imported."""
        return all(importlib.util.find_spec(module) is not None for module in self.modules)

    def folder(self) -> Path | None:
        """Folder of the first module, or None if the first module is not installed."""
        spec = importlib.util.find_spec(self.modules[0])
        return None if spec is None or spec.origin is None else Path(spec.origin).parent

    def missing(self, needed_for: str) -> MissingDependency:
        """The error that names the feature, the packages and the pip command."""
        return MissingDependency(self.title, needed_for=needed_for, install=self.install)

    def require(self, needed_for: str) -> None:
        """Raise MissingDependency if a module cannot be found."""
        if not self.is_installed():
            raise self.missing(needed_for)


def _extra(name: str, **titles: str) -> tuple[Requirement, ...]:
    """One requirement per package of one extra of ttexport. titles: import name → name of the package in messages."""
    return tuple(Requirement((module,), title, f"ttexport[{name}]") for module, title in titles.items())


(LLAMA_CPP,) = _extra("llamacpp", llama_cpp="llama-cpp-python")
(RAY,) = _extra("ray", ray="ray")
(MODEL_SIGNING,) = _extra("sign", model_signing="model-signing")
REPORT: Final = _extra("report", jinja2="Jinja2", junitparser="junitparser", matplotlib="matplotlib")
TRACE: Final = _extra("trace", torch="torch", transformers="transformers", onnxscript="onnxscript")
TUNE: Final = _extra("tune", trl="trl", datasets="datasets", accelerate="accelerate", matplotlib="matplotlib")
#: ``tune`` needs this package only if ``tune`` logs to TensorBoard.
(TENSORBOARD,) = _extra("tune", tensorboardX="tensorboardX")


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Name on PyPI → installed version, in the order of ``names``.

    The version is None for a package that is not installed, such as ttexport itself when run from its source folder.
    """
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
