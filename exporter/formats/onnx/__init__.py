"""ONNX: plan a folder from a merged model, then write it."""

from exporter.formats.onnx.plan import OnnxLayout, plan_onnx
from exporter.formats.onnx.precision import choose
from exporter.formats.onnx.write import write_onnx

__all__ = ["OnnxLayout", "choose", "plan_onnx", "write_onnx"]
