"""Define the tables ``[models.NAME]``, ``[signing]`` and ``[hub]`` of ``release.toml``, and find unknown keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """A table of ``release.toml``, whose keys are written with dashes."""


class ModelTable(_Table, frozen=True):
    """The table ``[models.NAME]``, which lists adapters that are merged together into the base.

    card: texts that override the texts in ``[card]``.
    """

    adapters: list[str] = []
    card: dict[str, Any] = {}


class SigningTable(_Table, frozen=True):
    """The table ``[signing]``, which selects signing with a private key file or with Sigstore.

    password_env: environment variable that contains the password of the private key.
    """

    key: str | None = None
    password_env: str | None = None
    sigstore: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values, with the path of the key file replaced by the file's name."""
        return {**msgspec.to_builtins(self), "key": Path(self.key).name if self.key else None}


class HubTable(_Table, frozen=True):
    """The table ``[hub]``: defaults for the options of ``--push-to-hub``."""

    revision: str | None = None
    message: str | None = None
    private: bool = False


def unknown_keys(table: Mapping[str, Any], known: Sequence[str] | type[msgspec.Struct], where: str) -> Iterator[str]:
    """Yield an error message for each key of ``table`` that is not in ``known``.

    Each message names the unknown key and the most similar known key.

    where: text before the keys in the messages, such as ``models.one.``.
    """
    if isinstance(known, type):
        known = [field.encode_name for field in msgspec.structs.fields(known)]
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, 0.0)
            yield f"{where}{key}: unknown key; the most similar known key is {nearest[0]}"
