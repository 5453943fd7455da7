"""Reads the weight and the bias of a module from a checkpoint as float32, as transformers would load the module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from exporter.errors import NotExpressible, TensorMismatch
from exporter.models.placement import as_array
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.types.changes import ByPeft
from exporter.sources.places import EMBEDDING, Place, place_of, use_of
from exporter.tensors import FLOATS, Array, cast, read

#: How a module applies its weight: as x @ W.T, as x @ W, by looking up rows, or element by element.
Layout = Literal["linear", "conv1d", "embedding", "vector"]


@dataclass(frozen=True)
class ModulePlaces:
    """The places in the checkpoint at which the base stores a module that an adapter changes.

    layout: how the module uses the weight, for example as a lookup table. weight: stored tensors that contain the
    weight. bias: stored tensors that contain the bias, or None if the module has no bias. weight_shape: shape of the
    weight; if the adapter contains a resized matrix, the shape of the resized matrix.
    """

    layout: Layout
    weight: Place
    bias: Place | None
    weight_shape: tuple[int, ...]


def module_places(checkpoint: Checkpoint, change: ByPeft, *, in_out: bool) -> ModulePlaces:
    """Find the stored tensors that contain the weight and the bias of the module that ``change`` changes.

    in_out: whether a linear layer stores the weight as (in, out), for a model class that ttexport does not know.

    Raises TensorMismatch if the base lacks the module or stores no floating-point weight, and NotExpressible for a
    weight that is neither a vector nor a matrix.
    """
    try:
        weight = place_of(checkpoint, change.module, "weight")
        bias = place_of(checkpoint, change.module, "bias")
    except ValueError as exc:
        raise _unknown(checkpoint, change, f"{change.module} ({exc})") from exc
    if weight is None:
        raise _unknown(checkpoint, change, change.module)
    for name in [weight.name] if weight.name else [part.block.name for part in weight.parts]:
        stored = checkpoint.tensors[name]
        if stored.spec.dtype not in FLOATS:
            expected = "a weight of a floating-point dtype"
            raise TensorMismatch(stored.place.path, name, expected=expected, found=stored.spec.dtype)
    shape = change.base.spec.shape if change.base is not None else weight.shape
    return ModulePlaces(_layout(checkpoint, change, weight, in_out=in_out), weight, bias, shape)


def _unknown(checkpoint: Checkpoint, change: ByPeft, actual: str) -> TensorMismatch:
    expected = f"a module that exists in the base, such as {checkpoint.tie.embedding.removesuffix('.weight')}"
    return TensorMismatch(change.path, change.key, expected=expected, found=actual)


def _layout(checkpoint: Checkpoint, change: ByPeft, weight: Place, *, in_out: bool) -> Layout:
    if len(weight.shape) == 1:
        return "vector"
    if len(weight.shape) != 2:
        raise NotExpressible(
            f"{change.path}: {change.key}",
            f"--via peft merges only vectors and matrices, but {change.module} has a weight of shape {weight.shape}",
        )
    if use_of(checkpoint, change.module) == EMBEDDING:
        return "embedding"
    if checkpoint.modules is not None and weight.module is not None:
        in_out = checkpoint.modules.architecture.stores_in_out(weight.module)
    return "conv1d" if in_out else "linear"


def values(checkpoint: Checkpoint, place: Place) -> Array:
    """Read the parameter that is stored at ``place``, as float32. Peak memory: the parameter plus one stored tensor."""
    if place.name is not None:
        return _float32(checkpoint.tensors[place.name])
    out = np.empty(place.shape, np.float32)
    for part in place.parts:
        axes = part.block.axes
        kept = [number for number, axis in enumerate(axes) if axis.stored_axis is not None]
        order = sorted(range(len(kept)), key=lambda position: axes[kept[position]].stored_axis or 0)
        stored = _float32(checkpoint.tensors[part.block.name])
        taken = stored[np.ix_(*[as_array(axes[kept[position]].stored) for position in order])]
        taken = taken.transpose(np.argsort(order))
        places = [as_array(axis.at) for axis in axes]
        out[np.ix_(*places)] = taken.reshape([len(positions) for positions in places])
    return out


def _float32(tensor: FileTensor) -> Array:
    return np.array(cast(read(tensor), "F32"))
