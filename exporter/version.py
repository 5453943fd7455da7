"""The version of this package, for ``--version`` and for what the artifacts record."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
