"""The refusal of a folder that cannot be patched."""

from __future__ import annotations

from exporter.errors import NotExpressible


def refusal(where: object, reason: str) -> NotExpressible:
    """The error to raise. The message suggests a merge, which writes the folder anew."""
    return NotExpressible(str(where), reason, instead="ttexport merge ADAPTER --to onnx writes the folder anew")
