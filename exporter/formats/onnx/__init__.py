"""Plan a folder of ONNX models from a merged model, and write the folder.

The names of this package are imported on first use, so that ``ttexport patch``, which uses only a few modules of the
package, does not import the library that builds ONNX graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.lazy import lazy_attributes

if TYPE_CHECKING:
    from exporter.formats.onnx.plan import OnnxLayout, plan_onnx
    from exporter.formats.onnx.weights.precision import choose
    from exporter.formats.onnx.write import write_onnx

__all__ = ["OnnxLayout", "choose", "plan_onnx", "write_onnx"]

__getattr__ = lazy_attributes(
    __name__,
    {
        "OnnxLayout": "exporter.formats.onnx.plan",
        "choose": "exporter.formats.onnx.weights.precision",
        "plan_onnx": "exporter.formats.onnx.plan",
        "write_onnx": "exporter.formats.onnx.write",
    },
)
