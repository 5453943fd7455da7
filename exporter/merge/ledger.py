"""Checks that exactly one rule handles each tensor, so that no tensor is lost or merged twice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from exporter.errors import LedgerError


class Ledger:
    """Records which rule handles each tensor of a file or folder.

    what: the word for a rule in error messages, such as "rule" or "writer".
    """

    def __init__(self, path: Path, names: Iterable[str], *, what: str) -> None:
        """Create a ledger for the tensors ``names``, each of which exactly one rule must handle."""
        self.path = path
        self._what = what
        self._taken: dict[str, str | None] = dict.fromkeys(names)

    def take(self, name: str, rule: str) -> None:
        """Record that ``rule`` handles the tensor ``name``.

        Raises LedgerError if the tensor is unknown or if another rule already handles the tensor.
        """
        if name not in self._taken:
            raise LedgerError(self.path, name, expected="a known tensor", found=f"an unknown tensor (rule: {rule})")
        if (first := self._taken[name]) is not None:
            raise LedgerError(self.path, name, expected=f"one {self._what}", found=f"two: {first}, {rule}")
        self._taken[name] = rule

    def close(self) -> dict[str, str]:
        """Return a dict that maps the name of every tensor to its rule.

        Raises LedgerError if no rule handles a tensor.
        """
        for name, rule in self._taken.items():
            if rule is None:
                raise LedgerError(
                    self.path, name, expected=f"one {self._what}", found=f"no {self._what}, so the tensor would be lost"
                )
        return {name: rule for name, rule in self._taken.items() if rule is not None}
