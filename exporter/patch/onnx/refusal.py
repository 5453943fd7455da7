"""Creates the error for an ONNX folder that cannot be patched."""

from __future__ import annotations

from exporter.errors import NotExpressible


def refusal(where: object, reason: str) -> NotExpressible:
    """Return the error to raise for the folder, file or tensor ``where``.

    The error message suggests that the user write a new ONNX folder with ``ttexport merge`` instead.
    """
    return NotExpressible(str(where), reason, instead="use ttexport merge ADAPTER --to onnx to write a new ONNX folder")
