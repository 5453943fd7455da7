"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: Powers of 1000 as disks count, powers of 1024 where the unit says so.
_UNITS: Final = {
    **{unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{unit: 1024**power for power, unit in enumerate(("b", "kib", "mib", "gib", "tib"))},
}
_SIZE: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]?i?b)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """``512MB``, ``1.5GiB``: a number of bytes, at least 1. Raises BadParameter."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    nbytes = int(float(match[1]) * unit) if match and unit else 0
    if nbytes < 1:
        raise click.BadParameter(f"expected a size such as 512MB or 2GiB, found {text!r:.80}")
    return nbytes


def size_option(name: str, variable: str, text: str) -> Callable[[_Command], _Command]:
    """An option whose value is a size; the variable holds bytes, or None where it is not given."""

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
        return None if value is None else parse_size(value)

    return click.option(name, variable, metavar="SIZE", callback=convert, help=text)
