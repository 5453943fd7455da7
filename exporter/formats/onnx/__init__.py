"""ONNX: plan a folder from a merged model, then write it.

The names are found when they are asked for: a patch needs other modules of this package, and must not wait for the
library that builds graphs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from exporter.formats.onnx.plan import OnnxLayout, plan_onnx
    from exporter.formats.onnx.precision import choose
    from exporter.formats.onnx.write import write_onnx

__all__ = ["OnnxLayout", "choose", "plan_onnx", "write_onnx"]

_HOMES: Final = {"OnnxLayout": "plan", "choose": "precision", "plan_onnx": "plan", "write_onnx": "write"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
