"""Find out which runtimes are installed. A check whose runtime is not installed is always reported as skipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from exporter.errors import MissingDependency
from exporter.packages import LLAMA_CPP, Requirement

_RUNTIMES: Final = {
    "llama.cpp": LLAMA_CPP,
    "onnxruntime": Requirement(("onnxruntime",), "onnxruntime", "onnxruntime"),
    "transformers": Requirement(("transformers", "peft", "torch"), "transformers, peft and torch", "ttexport"),
    "transformers-gguf": Requirement(("transformers", "torch", "gguf"), "transformers, torch and gguf", "ttexport"),
}
#: The accepted values of ``--require``.
NAMES: Final = tuple(_RUNTIMES)

#: Name of a module of this package that runs artifacts → name of the runtime in messages.
TITLES: Final = {
    "merged": "transformers",
    "gguf_in_transformers": "transformers",
    "llamacpp": "llama.cpp",
    "onnx_runtime": "ONNX Runtime",
    "onnx_seq2seq": "ONNX Runtime",
}


def installed(name: str) -> bool:
    """Whether the runtime ``name`` is installed, determined without importing the runtime's package."""
    return _RUNTIMES[name].is_installed()


def require(names: Iterable[str], *, needed_for: str) -> None:
    """Raise MissingDependency for the first runtime in ``names`` that is not installed."""
    for name in names:
        _RUNTIMES[name].require(needed_for)


def missing(name: str, *, needed_for: str) -> MissingDependency:
    """Return an error that contains the pip command for installing the runtime ``name``."""
    return _RUNTIMES[name].missing(needed_for)
