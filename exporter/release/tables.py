"""The tables of ``release.toml`` that are not option groups, and the search for unknown keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """A table of ``release.toml``. The keys of the table are written with dashes."""


class ModelTable(_Table, frozen=True):
    """``[models.NAME]``: adapters that are merged into the base together. card: texts that override ``[card]``."""

    adapters: list[str] = []
    card: dict[str, Any] = {}


class SigningTable(_Table, frozen=True):
    """``[signing]``: a private key file or Sigstore.

    password_env: environment variable with the password of the key.
    """

    key: str | None = None
    password_env: str | None = None
    sigstore: bool = False

    def to_json(self) -> dict[str, Any]:
        """The table, with the name of the key file in place of its path."""
        return {**msgspec.to_builtins(self), "key": Path(self.key).name if self.key else None}


class HubTable(_Table, frozen=True):
    """``[hub]``: defaults for the options of ``--push-to-hub``."""

    revision: str | None = None
    message: str | None = None
    private: bool = False


def unknown_keys(table: Mapping[str, Any], known: Sequence[str] | type[msgspec.Struct], where: str) -> Iterator[str]:
    """One line for each key of ``table`` that is not in ``known``, with the most similar known key.

    where: prefix of the key in the line, such as ``models.one.``.
    """
    if isinstance(known, type):
        known = [field.encode_name for field in msgspec.structs.fields(known)]
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, 0.0)
            yield f"{where}{key}: unknown key; the most similar known key is {nearest[0]}"
