"""Moved blocks are where torch puts the elements, for every operation and for operations on top of operations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from exporter.models import placement
from exporter.models.placement import Placed, Run
from tests.support.placed import assembled

Values = dict[str, torch.Tensor]


def tensors(*shapes: tuple[int, ...]) -> Values:
    """Return tensors "0", "1", … of the shapes; no two elements of all tensors are equal."""
    sizes = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    return {
        str(number): torch.arange(sizes[number], sizes[number + 1], dtype=torch.float32).reshape(shape)
        for number, shape in enumerate(shapes)
    }


def placed(values: Values) -> list[Placed]:
    return [placement.stored(name, value.shape) for name, value in values.items()]


def read(values: Values, part: Placed) -> npt.NDArray[np.float32]:
    return assembled(part, lambda name: values[name].numpy())


def transpose_then_stack(parts: list[Placed], axis: int) -> Placed:
    return placement.stack([placement.transpose(part, 0, 1) for part in parts], axis)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stack_is_torch_stack(axis: int) -> None:
    values = tensors((3, 4), (3, 4), (3, 4))
    assert np.array_equal(
        read(values, placement.stack(placed(values), axis)), torch.stack([*values.values()], axis).numpy()
    )


@pytest.mark.parametrize(("shapes", "axis"), [(((2, 4), (5, 4)), 0), (((2, 4), (2, 1), (2, 3)), 1), (((3,), (2,)), 0)])
def test_concatenate_is_torch_cat(shapes: tuple[tuple[int, ...], ...], axis: int) -> None:
    values = tensors(*shapes)
    assert np.array_equal(
        read(values, placement.concatenate(placed(values), axis)), torch.cat([*values.values()], axis).numpy()
    )


@pytest.mark.parametrize(("shape", "count", "axis"), [((6, 4), 3, 0), ((7, 4), 3, 0), ((4, 6), 2, 1), ((5,), 2, 0)])
def test_chunks_are_torch_chunks(shape: tuple[int, ...], count: int, axis: int) -> None:
    values = tensors(shape)
    want = torch.chunk(values["0"], count, axis)
    actual = placement.chunks(placed(values)[0], count, axis)
    assert [read(values, part).tolist() for part in actual] == [chunk.tolist() for chunk in want]


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (0, 2), (2, 1)])
def test_transpose_is_torch_transpose(first: int, second: int) -> None:
    values = tensors((2, 3, 4))
    part = placement.transpose(placed(values)[0], first, second)
    assert np.array_equal(read(values, part), values["0"].transpose(first, second).numpy())


def test_operations_apply_to_what_other_operations_gave() -> None:
    values = tensors((4, 6), (4, 6), (4, 6), (4, 6))
    first, second = list(values.values())[:2], list(values.values())[2:]
    order = placement.interleaved(8, inverse=False)
    parts = placed(values)
    part = placement.concatenate([placement.stack(parts[:2], 0), placement.stack(parts[2:], 0)], 1)
    part = placement.permute(placement.transpose(part, 1, 2), 2, order)
    want = torch.cat([torch.stack(first), torch.stack(second)], 1).transpose(1, 2)[:, :, torch.from_numpy(order)]
    assert np.array_equal(read(values, part), want.numpy())
    for axis, size in enumerate(want.shape):
        cut = placement.cut(part, axis, 1, size - 1) if size > 2 else placement.cut(part, axis, 1, size)
        wanted = want.narrow(axis, 1, cut.shape[axis])
        assert np.array_equal(read(values, cut), wanted.numpy())


def test_a_permutation_of_a_permutation_is_their_composition() -> None:
    values = tensors((8, 2))
    there, back = (placement.interleaved(8, inverse=inverse) for inverse in (False, True))
    moved = placement.permute(placed(values)[0], 0, there)
    assert not np.array_equal(read(values, moved), values["0"].numpy())
    assert np.array_equal(read(values, placement.permute(moved, 0, back)), values["0"].numpy())


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        (lambda part: part, True),
        (lambda part: placement.cut(part, 0, 0, 2), True),
        (lambda part: placement.cut(part, 0, 1, 4), False),
        (lambda part: placement.transpose(part, 0, 1), False),
        (lambda part: placement.permute(part, 0, placement.rotary(4, 1, inverse=False)), False),
        (lambda part: placement.stack([part], 0), False),
        (lambda part: placement.concatenate([part, part], 0), False),
    ],
    ids=["stored", "a first part", "a later part", "transposed", "permuted", "stacked", "two blocks"],
)
def test_a_parameter_is_whole_if_no_element_moved(part: Callable[[Placed], Placed], whole: bool) -> None:
    assert part(placement.stored("0", (4, 6))).is_whole is whole


def test_parts_of_other_shapes_are_errors() -> None:
    parts = [placement.stored("0", (2, 3)), placement.stored("1", (2, 4))]
    with pytest.raises(ValueError, match="equal shape"):
        placement.stack(parts, 0)
    with pytest.raises(ValueError, match="equal lengths of all axes"):
        placement.concatenate(parts, 0)
    with pytest.raises(ValueError, match="equal lengths of all axes"):
        placement.concatenate([placement.stored("0", (2,)), placement.stored("1", (2,))], 1)
    assert placement.concatenate(parts, 1).shape == (2, 7)


def test_consecutive_positions_stay_consecutive() -> None:
    parts = placement.stack([placement.stored(str(number), (1000, 500)) for number in range(3)], 0)
    chunk = placement.chunks(placement.transpose(parts, 1, 2), 2, 1)[1]
    assert all(isinstance(axis.at, Run) and isinstance(axis.stored, Run) for b in chunk.blocks for axis in b.axes)
