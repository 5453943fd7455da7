"""The version of this package, for ``--version`` and the provenance of artifacts."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
