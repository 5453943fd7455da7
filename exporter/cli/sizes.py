"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from typing import Any, Final

import click

#: Powers of 1000 as disks count, powers of 1024 where the unit says so.
_UNITS: Final = {
    **{unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{unit: 1024**power for power, unit in enumerate(("b", "kib", "mib", "gib", "tib"))},
}
_SIZE: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]?i?b)", re.IGNORECASE)


class Size(click.ParamType[int, object]):
    """``512MB``, ``1.5GiB``: a number of bytes, at least 1."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises BadParameter, which names the option."""
        match = _SIZE.fullmatch(str(value).strip())
        unit = _UNITS.get(match[2].lower()) if match else None
        nbytes = int(float(match[1]) * unit) if match and unit else 0
        if nbytes < 1:
            self.fail(f"expected a size such as 512MB or 2GiB, found {value!r:.80}", param, ctx)
        return nbytes
