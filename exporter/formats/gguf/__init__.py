"""GGUF: plan a file from a merged model, then write it."""

from exporter.formats.gguf.converter import ConverterLayout, plan_converter, write_converted
from exporter.formats.gguf.plan import GgufLayout, plan_gguf
from exporter.formats.gguf.stream import write_gguf

__all__ = ["ConverterLayout", "GgufLayout", "plan_converter", "plan_gguf", "write_converted", "write_gguf"]
