"""The command-line interface of ttexport. The entry point of the script ``ttexport`` is ``main``."""

from __future__ import annotations

from exporter.cli.main import main

__all__ = ["main"]
