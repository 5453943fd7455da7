"""The tables of ``release.toml`` that are no option groups, and the search for keys that a table does not have."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """A table of the file; keys are written with dashes."""


class ModelTable(_Table, frozen=True):
    """``[models.NAME]``: adapters that go into the base together. card: texts that go before those of ``[card]``."""

    adapters: list[str] = []
    card: dict[str, Any] = {}


class SigningTable(_Table, frozen=True):
    """``[signing]``: by a private key in a file, or through Sigstore. password_env: the variable with its password."""

    key: str | None = None
    password_env: str | None = None
    sigstore: bool = False

    def to_json(self) -> dict[str, Any]:
        """The table with the key's file by its name alone."""
        return {**msgspec.to_builtins(self), "key": Path(self.key).name if self.key else None}


class HubTable(_Table, frozen=True):
    """``[hub]``: how ``--push-to-hub`` sends the release, unless its own options say otherwise."""

    revision: str | None = None
    message: str | None = None
    private: bool = False


def unknown_keys(table: Mapping[str, Any], known: Sequence[str] | type[msgspec.Struct], where: str) -> Iterator[str]:
    """A line for every key of ``table`` that is not in ``known``, with the nearest one. where: before the key."""
    if isinstance(known, type):
        known = [field.encode_name for field in msgspec.structs.fields(known)]
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, 0.0)
            yield f"{where}{key}: unknown key; the nearest known one is {nearest[0]}"
