"""Converted parameters equal what transformers' own operations make of the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import core_model_loading as loading

from exporter.models.facts import Operation, Transform
from exporter.models.operations import convert
from exporter.models.placement import Placed, stored
from tests.support.placed import assembled

CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "vision_config": {"num_attention_heads": 2}}
Sources = dict[str, list[torch.Tensor]]


def sources(*groups: tuple[int, tuple[int, ...]]) -> Sources:
    """Return (number of tensors, shape) for every source pattern "s0", "s1", …; all elements differ."""
    total, result = 0.0, {}
    for number, (count, shape) in enumerate(groups):
        size = int(np.prod(shape))
        result[f"s{number}"] = [
            torch.arange(total + k * size, total + (k + 1) * size).reshape(shape) for k in range(count)
        ]
        total += count * size
    return result


def ours(
    values: Sources, targets: int, operations: list[Operation], config: Mapping[str, Any], **options: Any
) -> dict[int, Placed]:
    names = [f"t{number}" for number in range(targets)]
    transform = Transform("WeightConverter", list(values), names, operations)
    parts = {
        key: [stored(f"{key}.{number}", value.shape) for number, value in enumerate(listed)]
        for key, listed in values.items()
    }
    return convert(transform, parts, config, **options)


def theirs(values: Sources, targets: int, operations: list[Any]) -> dict[str, torch.Tensor]:
    names = [f"t{number}" for number in range(targets)]
    vision = SimpleNamespace(**CONFIG["vision_config"])  # type: ignore[arg-type]
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, vision_config=vision)
    parts: dict[str, Any] = {key: list(listed) for key, listed in values.items()}
    for operation in operations:
        parts = operation.convert(
            parts, source_patterns=list(values), target_patterns=names, config=config, full_layer_name="t0", model=None
        )
    return {name: value[0] if isinstance(value, list) else value for name, value in parts.items()}


def read(values: Sources, part: Placed) -> torch.Tensor:
    def value(name: str) -> Any:
        key, number = name.split(".")
        return values[key][int(number)].numpy()

    return torch.from_numpy(assembled(part, value))


MERGE, JOIN, CHUNK = Operation("MergeModulelist"), Operation("Concatenate", dim=1), Operation("Chunk")
CASES: dict[str, tuple[Sources, int, list[Operation], list[Any]]] = {
    "stack": (sources((3, (2, 4))), 1, [MERGE], [loading.MergeModulelist(0)]),
    "stack on axis 1": (
        sources((3, (2, 4))),
        1,
        [Operation("MergeModulelist", dim=1)],
        [loading.MergeModulelist(1)],
    ),
    "stack and fuse": (
        sources((3, (2, 4)), (3, (2, 4))),
        1,
        [MERGE, JOIN],
        [loading.MergeModulelist(0), loading.Concatenate(1)],
    ),
    "fuse": (sources((1, (2, 4)), (1, (6, 4))), 1, [Operation("Concatenate")], [loading.Concatenate(0)]),
    "shards": (sources((3, (2, 4))), 1, [Operation("Concatenate")], [loading.Concatenate(0)]),
    "chunk": (sources((1, (6, 4))), 3, [CHUNK], [loading.Chunk(0)]),
    "interleave": (sources((1, (6, 4))), 1, [Operation("Interleave")], [loading.Interleave(0)]),
    "interleave back on axis 1": (
        sources((1, (2, 6, 4))),
        1,
        [Operation("Interleave", dim=1, inverse=True)],
        [loading.Interleave(1, inverse=True)],
    ),
    "interleave and chunk": (
        sources((1, (6, 4))),
        2,
        [Operation("Interleave"), CHUNK],
        [loading.Interleave(0), loading.Chunk(0)],
    ),
    "transpose": (
        sources((1, (2, 3, 4))),
        1,
        [Operation("Transpose", dim0=1, dim1=2)],
        [loading.Transpose(1, 2)],
    ),
    "rope": (sources((1, (16, 3))), 1, [Operation("PermuteForRope")], [loading.PermuteForRope()]),
    "rope of a bias": (sources((1, (16,))), 1, [Operation("PermuteForRope")], [loading.PermuteForRope()]),
    "rope back, of the vision config": (
        sources((1, (16, 3))),
        1,
        [Operation("PermuteForRope", inverse=True, subconfig_key="vision_config")],
        [loading.PermuteForRope("vision_config", inverse=True)],
    ),
    "chunk and rope of two chunks": (
        sources((1, (24, 3))),
        3,
        [CHUNK, Operation("PermuteForRope", permute_layer_names=["t0", "t2"])],
        [loading.Chunk(0), loading.PermuteForRope(permute_layer_names=["t0", "t2"])],
    ),
    "experts of text and vision": (
        sources((4, (2, 3)), (4, (2, 3))),
        2,
        [Operation("ErnieFuseAndSplitTextVisionExperts")],
        [loading.ErnieFuseAndSplitTextVisionExperts()],
    ),
    "an odd number of experts": (
        sources((5, (2, 3))),
        2,
        [Operation("ErnieFuseAndSplitTextVisionExperts")],
        [loading.ErnieFuseAndSplitTextVisionExperts()],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_converter_makes_what_transformers_makes(case: str) -> None:
    values, targets, operations, counterparts = CASES[case]
    want = theirs(values, targets, counterparts)
    actual = ours(values, targets, operations, CONFIG)
    assert sorted(actual) == list(range(targets)) == sorted(int(name[1:]) for name in want)
    for number, part in actual.items():
        assert torch.equal(read(values, part), want[f"t{number}"].float())


def test_a_fused_projection_is_split_by_the_numbers_of_heads() -> None:
    values = sources((1, (16, 3)))
    parts = ours(values, 3, [Operation("Split")], CONFIG)
    whole = values["s0"][0].float()
    assert [part.shape for part in parts.values()] == [(8, 3), (4, 3), (4, 3)]
    assert torch.equal(torch.cat([read(values, parts[number]) for number in range(3)]), whole)


@pytest.mark.parametrize(("expected", "moved"), [((2, 3, 4), False), ((2, 4, 3), True), (None, True)])
def test_a_transposition_that_checks_the_shape_leaves_the_right_shape(
    expected: tuple[int, ...] | None, moved: bool
) -> None:
    values = sources((1, (2, 3, 4)))
    operation = Operation("Transpose", dim0=1, dim1=2, check_dims=True)
    (part,) = ours(values, 1, [operation], CONFIG, expected=expected).values()
    whole = values["s0"][0].float()
    assert torch.equal(read(values, part), whole.transpose(1, 2) if moved else whole)


@pytest.mark.parametrize(
    ("values", "targets", "operations", "config", "reason"),
    [
        (sources((1, (2, 3))), 3, [CHUNK], CONFIG, "one chunk for each target"),
        (sources((2, (4, 3))), 2, [CHUNK], CONFIG, "expected one tensor"),
        (sources((2, (4, 3))), 1, [Operation("Transpose")], CONFIG, "expected one tensor"),
        (sources((1, (15, 3))), 3, [Operation("Split")], CONFIG, "num_attention_heads"),
        (sources((1, (16, 3))), 3, [Operation("Split")], {}, "num_attention_heads"),
        (sources((1, (16, 3))), 1, [Operation("PermuteForRope")], {}, "num_attention_heads"),
        (sources((1, (12, 3))), 1, [Operation("PermuteForRope")], CONFIG, "even number of rows"),
        (
            sources((1, (16, 3))),
            1,
            [Operation("PermuteForRope", subconfig_key="vision_config")],
            {"num_attention_heads": 4},
            "num_attention_heads",
        ),
        (sources((1, (5, 3))), 1, [Operation("Interleave")], CONFIG, "even number"),
        (sources((1, (2, 3)), (1, (2, 3))), 1, [MERGE], CONFIG, "for each target"),
        (
            sources((1, (2, 3))),
            2,
            [Operation("ErnieFuseAndSplitTextVisionExperts")],
            CONFIG,
            "at least one expert for each target",
        ),
        (
            sources((1, (2, 3))),
            1,
            [Operation("Conv3dToLinear")],
            CONFIG,
            "weight conversion Conv3dToLinear is not supported",
        ),
        (sources((1, (3,))), 1, [Operation("Transpose", dim0=1, dim1=2)], CONFIG, "axes"),
        (sources((1, (3,))), 2, [Operation("Chunk", dim=1)], CONFIG, "axes"),
        (sources((2, (3,))), 1, [Operation("MergeModulelist", dim=2)], CONFIG, "equal shape"),
        (sources((1, ())), 1, [Operation("PermuteForRope")], CONFIG, "axes"),
        (sources((1, ())), 1, [Operation("Interleave")], CONFIG, "axes"),
        (sources((1, (3,))), 3, [Operation("Split", dim=1)], CONFIG, "axes"),
    ],
)
def test_tensors_that_do_not_fit_the_operations_are_errors(
    values: Sources, targets: int, operations: list[Operation], config: Mapping[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        ours(values, targets, operations, config)


def test_missing_tensors_of_a_converter_are_an_error() -> None:
    values = sources((2, (2, 3)), (1, (2, 3)))
    with pytest.raises(ValueError, match="equal lengths of all axes"):
        ours(values, 1, [MERGE, JOIN], CONFIG)
    transform = Transform("WeightConverter", ["s0", "s1"], ["t0"], [MERGE, JOIN])
    with pytest.raises(ValueError, match="stored tensors that match the sources of the weight converter"):
        convert(transform, {"s0": [stored("s0.0", (2, 3))]}, CONFIG)
