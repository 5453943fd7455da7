"""Typed access to config.json: a missing or odd value is named, never guessed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from exporter.errors import BadInput


class Settings:
    """A config table whose values are checked when asked for."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        """``table`` is a parsed config.json, or the part of it that describes the text model."""
        self.table = table

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive 31-bit integer; absent or null gives ``default`` if there is one. Raises BadInput otherwise."""
        value = self.table.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise BadInput(f"config.json: {key}: expected a positive 31-bit integer, found {value!r:.80}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; absent gives ``default`` if there is one. Raises BadInput otherwise."""
        value = self.table.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise BadInput(f"config.json: {key}: expected a number above 0, found {value!r:.80}")
        return float(value)
