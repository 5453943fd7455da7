"""The command line. The script's entry point is ``main``."""

from __future__ import annotations

from exporter.cli.main import main

__all__ = ["main"]
