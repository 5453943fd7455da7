"""Apply transformers' conversion operations to descriptions of tensors, without reading tensor data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from exporter.models.facts import Operation, Transform
from exporter.models.placement import (
    Placed,
    chunks,
    concatenate,
    cut,
    interleaved,
    permute,
    rotary,
    size_of,
    stack,
    transpose,
)

#: Source pattern or target pattern → list of inputs or outputs of an operation.
Parts = dict[str, list[Placed]]


def convert(
    transform: Transform, sources: Parts, config: Mapping[str, Any], expected: Sequence[int] | None = None
) -> dict[int, Placed]:
    """Map the number of each target pattern of a converter to the parameter that the converter makes.

    sources: the stored tensors that match each source pattern, in numeric order where names differ in a number. config:
    the config of the model, needed for the number of attention heads. expected: the shape of the parameter, if known,
    because some transpositions depend on the shape. Raises ValueError if the operations cannot be applied to the
    tensors.
    """
    parts = dict(sources)
    for operation in transform.operations:
        parts = _apply(operation, parts, transform, config, expected)
    targets = list(transform.targets)
    results: dict[int, Placed] = {}
    for key, values in parts.items():
        number = targets.index(key) if key in targets else 0
        if len(values) != 1 or number in results:
            raise ValueError("expected one tensor for each target of the weight converter")
        results[number] = values[0]
    return results


def _apply(
    operation: Operation,
    parts: Parts,
    transform: Transform,
    config: Mapping[str, Any],
    expected: Sequence[int] | None,
) -> Parts:
    targets = transform.targets
    match operation.name:
        case "MergeModulelist":
            target = targets[0] if len(parts) == 1 else None
            return {target or key: [stack(values, operation.dim)] for key, values in parts.items()}
        case "Concatenate":
            joined = [value for key in transform.sources for value in parts.get(key, [])]
            if not joined:
                raise ValueError(
                    "expected stored tensors that match the sources of the weight converter, found no such tensor"
                )
            return {targets[0]: [concatenate(joined, operation.dim)]}
        case "Chunk":
            pieces = chunks(_only(parts), len(targets), operation.dim)
            if len(pieces) != len(targets):
                raise ValueError(
                    "expected an axis that can be split into one chunk for each target of the weight converter"
                )
            return {target: [piece] for target, piece in zip(targets, pieces, strict=True)}
        case "Split":
            return dict(
                zip(targets, ([piece] for piece in _projections(_only(parts), operation.dim, config)), strict=True)
            )
        case "Transpose":
            value = _only(parts)
            if not (operation.check_dims and expected is not None and tuple(expected) == value.shape):
                value = transpose(value, operation.dim0, operation.dim1)
            return {targets[0] if len(targets) == 1 else transform.sources[0]: [value]}
        case "Interleave":
            value = _only(parts)
            order = interleaved(size_of(value, operation.dim), inverse=operation.inverse)
            return {targets[0]: [permute(value, operation.dim, order)]}
        case "PermuteForRope":
            return {_renamed(key, transform): [_rope(operation, key, values, config)] for key, values in parts.items()}
        case "ErnieFuseAndSplitTextVisionExperts":
            return _ernie(operation, parts, transform)
        case _:
            raise ValueError(f"transformers' weight conversion {operation.name} is not supported")


def _projections(value: Placed, axis: int, config: Mapping[str, Any]) -> list[Placed]:
    """Split a fused QKV projection into query, key and value projections, whose sizes are computed from the config."""
    text: Any = config.get("text_config")
    table: Mapping[str, Any] = text if isinstance(text, dict) else config
    heads, groups = table.get("num_attention_heads"), table.get("num_key_value_heads")
    size = size_of(value, axis)
    if not isinstance(heads, int) or not isinstance(groups, int) or size % (heads + 2 * groups):
        raise ValueError("expected a fused projection of num_attention_heads + 2 * num_key_value_heads heads")
    head_dim = size // (heads + 2 * groups)
    bounds = [0, heads * head_dim, (heads + groups) * head_dim, size]
    return [cut(value, axis, start, stop) for start, stop in pairwise(bounds)]


def _only(parts: Parts) -> Placed:
    values = [value for listed in parts.values() for value in listed]
    if len(values) != 1:
        raise ValueError("expected one tensor")
    return values[0]


def _renamed(key: str, transform: Transform) -> str:
    alone = len(transform.targets) == 1 and len(transform.sources) == 1
    return transform.targets[0] if alone else key


def _rope(operation: Operation, key: str, values: list[Placed], config: Mapping[str, Any]) -> Placed:
    (value,) = values
    names = operation.permute_layer_names
    if names is not None and not any(name in key for name in names):
        return value
    table: Any = config.get(operation.subconfig_key) if operation.subconfig_key else config
    heads = table.get("num_attention_heads") if isinstance(table, dict) else None
    rows = size_of(value, 0)
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise ValueError("expected num_attention_heads in the config, and an even number of rows for each head")
    return permute(value, 0, rotary(rows, heads, inverse=operation.inverse))


def _ernie(operation: Operation, parts: Parts, transform: Transform) -> Parts:
    """Split the experts evenly among the targets, and stack and concatenate the experts of each target."""
    count = len(transform.targets)
    shares: list[list[Placed]] = [[] for _ in range(count)]
    for key in transform.sources:
        values = parts.get(key, [])
        size = -(-len(values) // count)
        if len(values) <= (count - 1) * size:
            raise ValueError("expected at least one expert for each target of the weight converter")
        for number in range(count):
            shares[number].append(stack(values[number * size : (number + 1) * size], operation.stack_dim))
    return {
        target: [concatenate(share, operation.concat_dim)]
        for target, share in zip(transform.targets, shares, strict=True)
    }
