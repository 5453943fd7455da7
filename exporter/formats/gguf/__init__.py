"""GGUF: plan a file from a merged model, then write it; by our own writer, or by llama.cpp's converter.

What is named here is imported when it is asked for: patching and quantising need no description of a model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from exporter.formats.gguf.converter import ConverterLayout, plan_converter, write_converted
    from exporter.formats.gguf.plan import GgufLayout, plan_gguf
    from exporter.formats.gguf.stream import write_gguf

__all__ = ["ConverterLayout", "GgufLayout", "plan_converter", "plan_gguf", "write_converted", "write_gguf"]

_HOMES: Final = {
    "ConverterLayout": "converter",
    "GgufLayout": "plan",
    "plan_converter": "converter",
    "plan_gguf": "plan",
    "write_converted": "converter",
    "write_gguf": "stream",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
