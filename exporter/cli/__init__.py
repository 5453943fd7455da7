"""The command line; ``main`` is the script's entry point."""

from __future__ import annotations

from exporter.cli.main import main

__all__ = ["main"]
