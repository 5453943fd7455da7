"""Rounding of values to narrower floats and to integers, shared by the formats."""

from __future__ import annotations

import numpy as np

from exporter.errors import BadInput
from exporter.tensors import DTYPES, Array, Float32, cast


def narrowed(values: Array, dtype: str) -> Array:
    """``values`` in the float dtype ``dtype`` (safetensors spelling), the input itself if it has that dtype.

    Values are rounded once, from float32, which holds all stored values exactly except F64's.
    Raises BadInput for values beyond the range of F16.
    """
    if values.dtype == DTYPES[dtype]:
        return values
    with np.errstate(over="ignore"):
        out = cast(cast(values, "F32"), dtype)
    if dtype == "F16" and not np.isfinite(out).all():
        raise BadInput("expected finite values that F16 can hold (up to 65504), found another")
    return out


def round_half_away(exact: Float32) -> Float32:
    """The nearest integers, halves away from zero as C's roundf rounds; np.rint rounds halves to even.

    Overwrites ``exact``. Memory: one array more.
    """
    whole = np.trunc(exact)
    exact -= whole  # no bit is lost
    whole += exact >= 0.5
    whole -= exact <= -0.5
    return whole
