"""Round values to narrower floats and to integers, for all output formats."""

from __future__ import annotations

import numpy as np

from exporter.errors import BadInput
from exporter.tensors import DTYPES, Array, Float32, cast


def narrowed(values: Array, dtype: str) -> Array:
    """Round ``values`` to ``dtype`` (safetensors spelling).

    If ``values`` already has the dtype ``dtype``, the array is returned unchanged. Values are first converted to
    float32, which is exact unless the stored dtype is F64, and then rounded once. Raises BadInput for values beyond the
    range of F16.
    """
    if values.dtype == DTYPES[dtype]:
        return values
    with np.errstate(over="ignore"):
        out = cast(cast(values, "F32"), dtype)
    if dtype == "F16" and not np.isfinite(out).all():
        raise BadInput("expected finite values in the range of F16 (up to 65504), found a value out of range")
    return out


def round_half_away(exact: Float32) -> Float32:
    """Round to the nearest integers, with halves away from zero, like C's roundf and unlike numpy's np.rint.

    The function overwrites the array ``exact``. Peak memory: an additional array with the size of ``exact``.
    """
    whole = np.trunc(exact)
    exact -= whole  # this subtraction is exact
    whole += exact >= 0.5
    whole -= exact <= -0.5
    return whole
