"""Finds optional Python packages and their versions, and gives the command that installs missing packages.

Imports no optional package.
"""

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
    """The optional packages that a feature of ttexport needs.

    modules: import names of the packages. title: names of the packages in error messages. install: the argument to pass
    to ``pip install``.
    """

    modules: tuple[str, ...]
    title: str
    install: str

    def is_installed(self) -> bool:
        """Whether every module of the requirement is installed. No module is imported."""
        return all(importlib.util.find_spec(module) is not None for module in self.modules)

    def folder(self) -> Path | None:
        """Return the folder of the requirement's first module, or None if the module is not installed."""
        spec = importlib.util.find_spec(self.modules[0])
        return None if spec is None or spec.origin is None else Path(spec.origin).parent

    def missing(self, needed_for: str) -> MissingDependency:
        """Return an error that names the feature, the missing packages and the pip command that installs them."""
        return MissingDependency(self.title, needed_for=needed_for, install=self.install)

    def require(self, needed_for: str) -> None:
        """Raise MissingDependency if a module of the requirement is not installed."""
        if not self.is_installed():
            raise self.missing(needed_for)


def _extra(name: str, **titles: str) -> tuple[Requirement, ...]:
    """Return a requirement for each package in ``titles``, which all belong to the extra ``ttexport[name]``.

    titles: maps import names to display names.
    """
    return tuple(Requirement((module,), title, f"ttexport[{name}]") for module, title in titles.items())


(LLAMA_CPP,) = _extra("llamacpp", llama_cpp="llama-cpp-python")
#: Packages that merge the adapters that only PEFT can merge.
PEFT: Final = Requirement(("peft", "torch", "transformers"), "peft, torch and transformers", "ttexport")
(RAY,) = _extra("ray", ray="ray")
(MODEL_SIGNING,) = _extra("sign", model_signing="model-signing")
REPORT: Final = _extra("report", jinja2="Jinja2", junitparser="junitparser", matplotlib="matplotlib")
TRACE: Final = _extra("trace", torch="torch", transformers="transformers", onnxscript="onnxscript")
TUNE: Final = _extra("tune", trl="trl", datasets="datasets", accelerate="accelerate", matplotlib="matplotlib")
#: ``tune`` needs this package only if ``tune`` logs to TensorBoard.
(TENSORBOARD,) = _extra("tune", tensorboardX="tensorboardX")


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Map each PyPI name in ``names`` to the installed version of the package, in the order of ``names``.

    The version is None for a package that is not installed, such as ttexport when ttexport runs from its source folder.
    """
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
