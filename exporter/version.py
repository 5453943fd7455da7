"""Defines the version of ttexport, which ``--version`` prints and which is stored in the provenance of artifacts."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
