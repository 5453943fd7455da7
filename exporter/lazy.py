"""Imports the attributes of a package on first use, so that importing the package itself is fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_attributes(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` function (PEP 562) for ``package``.

    homes: maps each public name to the full name of the module that defines the name. The returned ``__getattr__``
    raises AttributeError for a name that is not in ``homes``.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return find
