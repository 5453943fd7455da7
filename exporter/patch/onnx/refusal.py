"""The refusal of a folder that cannot be patched."""

from __future__ import annotations

from exporter.errors import NotExpressible


def refusal(where: object, reason: str) -> NotExpressible:
    """The error to raise; it points to the merge, which writes the folder anew."""
    return NotExpressible(str(where), reason, instead="ttexport merge ADAPTER --to onnx writes the folder anew")
