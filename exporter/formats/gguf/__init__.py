"""GGUF: plan a file from a merged model, then write it."""

from exporter.formats.gguf.plan import GgufLayout, plan_gguf
from exporter.formats.gguf.stream import write_gguf

__all__ = ["GgufLayout", "plan_gguf", "write_gguf"]
