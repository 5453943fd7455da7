"""Plan a GGUF file from a merged model, and write the file.

The public names of this package are imported on first use, so that ``ttexport patch``, which uses only a few modules of
the package, does not import the modules that describe model families.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.lazy import lazy_attributes

if TYPE_CHECKING:
    from exporter.formats.gguf.plan import GgufLayout, plan_gguf
    from exporter.formats.gguf.stream import write_gguf

__all__ = ["GgufLayout", "plan_gguf", "write_gguf"]

__getattr__ = lazy_attributes(
    __name__,
    {
        "GgufLayout": "exporter.formats.gguf.plan",
        "plan_gguf": "exporter.formats.gguf.plan",
        "write_gguf": "exporter.formats.gguf.stream",
    },
)
