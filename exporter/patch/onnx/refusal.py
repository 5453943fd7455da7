"""Creates the error for an ONNX folder that cannot be patched."""

from __future__ import annotations

from exporter.errors import NotExpressible


def refusal(where: object, reason: str) -> NotExpressible:
    """The error to raise.

    The error message suggests ``ttexport merge`` instead of a patch, to write a new ONNX folder.
    """
    return NotExpressible(str(where), reason, instead="use ttexport merge ADAPTER --to onnx to write a new ONNX folder")
