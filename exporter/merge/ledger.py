"""The coverage ledger: a named rule takes every tensor exactly once, or the merge stops."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from exporter.errors import LedgerError


class Ledger:
    """Accounts for the tensors of one file or folder.

    ``what`` completes "expected one …" in messages: "rule", "writer".
    """

    def __init__(self, path: Path, names: Iterable[str], *, what: str) -> None:
        """``names`` are the tensors to account for."""
        self.path = path
        self._what = what
        self._taken: dict[str, str | None] = dict.fromkeys(names)

    def take(self, name: str, rule: str) -> None:
        """Record that ``rule`` takes ``name``. Raises LedgerError for an unknown tensor or one taken before."""
        if name not in self._taken:
            raise LedgerError(self.path, name, expected="a tensor of this file", found=f"none by that name ({rule})")
        if (first := self._taken[name]) is not None:
            raise LedgerError(self.path, name, expected=f"one {self._what}", found=f"two: {first}, {rule}")
        self._taken[name] = rule

    def close(self) -> dict[str, str]:
        """Name → rule for every tensor. Raises LedgerError naming the first tensor that no rule took."""
        for name, rule in self._taken.items():
            if rule is None:
                raise LedgerError(self.path, name, expected=f"one {self._what}", found="none: it would be lost")
        return {name: rule for name, rule in self._taken.items() if rule is not None}
