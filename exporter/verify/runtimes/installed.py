"""Which runtimes are there: a proof that needs a missing one says so, instead of being a smaller proof."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from exporter.errors import MissingDependency


@dataclass(frozen=True, slots=True)
class _Runtime:
    """``modules`` must be importable; ``package`` is what a person knows, ``install`` what pip takes."""

    modules: tuple[str, ...]
    package: str
    install: str


_RUNTIMES: Final = {
    "llama.cpp": _Runtime(("llama_cpp",), "llama-cpp-python", "ttexport[llamacpp]"),
    "onnxruntime": _Runtime(("onnxruntime",), "onnxruntime", "onnxruntime"),
    "transformers": _Runtime(("transformers", "peft", "torch"), "transformers, peft and torch", "ttexport"),
    "transformers-gguf": _Runtime(("transformers", "torch", "gguf"), "transformers, torch and gguf", "ttexport"),
}
#: What ``--require`` takes.
NAMES: Final = tuple(_RUNTIMES)

#: Module of this package that runs artifacts → what computes in it.
TITLES: Final = {
    "merged": "transformers",
    "gguf_in_transformers": "transformers",
    "llamacpp": "llama.cpp",
    "onnx_runtime": "ONNX Runtime",
    "onnx_seq2seq": "ONNX Runtime",
}


def installed(name: str) -> bool:
    """Whether the runtime is there; nothing is imported."""
    return all(importlib.util.find_spec(module) is not None for module in _RUNTIMES[name].modules)


def require(names: Iterable[str], *, needed_for: str) -> None:
    """Raise MissingDependency for the first of ``names`` that is not there."""
    for name in names:
        if not installed(name):
            raise missing(name, needed_for=needed_for)


def missing(name: str, *, needed_for: str) -> MissingDependency:
    """The error that says what to install."""
    runtime = _RUNTIMES[name]
    return MissingDependency(runtime.package, needed_for=needed_for, install=runtime.install)
