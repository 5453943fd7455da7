"""Parameters as a module map assembles them from stored tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from exporter.models.module_map import ModuleMap
from exporter.models.placement import Placed, as_array
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.tensors import read

Values = npt.NDArray[np.float32]


def assembled(placed: Placed, stored: Callable[[str], Values]) -> Values:
    """Return the parameter ``placed`` with the values of the stored tensors, and NaN where no block lies."""
    out = np.full(placed.shape, np.nan, np.float32)
    for block in placed.blocks:
        kept = [number for number, axis in enumerate(block.axes) if axis.stored_axis is not None]
        order = sorted(kept, key=lambda number: block.axes[number].stored_axis or 0)
        values = stored(block.name)[np.ix_(*[as_array(block.axes[number].stored) for number in order])]
        values = values.transpose([order.index(number) for number in kept])
        shape = [len(as_array(axis.at)) for axis in block.axes]
        place = np.ix_(*[as_array(axis.at) for axis in block.axes])
        assert np.isnan(out[place]).all(), "blocks overlap"
        out[place] = values.reshape(shape)
    return out


def parameter(
    checkpoint: Checkpoint, modules: ModuleMap, name: str, expected: Sequence[int] | None = None
) -> Values | None:
    """Return the parameter ``name`` of the loaded model from the tensors of ``checkpoint``, or None if not stored."""
    placed = modules.placed(name, lambda stored: checkpoint.tensors[stored].spec.shape, expected)
    if placed is None:
        return None
    return assembled(placed, lambda stored: read(checkpoint.tensors[stored]).astype(np.float32))
