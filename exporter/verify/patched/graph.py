"""Compare the ONNX graphs of a model before and after a patch.

A patch may change only those parts of a graph that depend on the number of tokens, such as shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message  # type: ignore[import-untyped]  # protobuf ships no stubs
from onnx import ModelProto, TensorProto, numpy_helper

from exporter.verify.patched.files import PROVENANCE


@dataclass(frozen=True)
class GraphPair:
    """The ONNX graphs of a model before and after a patch.

    vocabulary: the initialisers of the embedding and the LM head; other checks compare the bytes, lengths and file
    offsets of these initialisers. sizes: a pair (number of tokens before the patch, number of tokens after the patch).
    """

    old: ModelProto
    new: ModelProto
    vocabulary: Set[str]
    sizes: tuple[int, int]

    def difference(self) -> str | None:
        """Return the protobuf field path of the first difference that a patch must not make, or None."""
        for model in (self.old, self.new):
            kept = [prop for prop in model.metadata_props if not prop.key.startswith(PROVENANCE)]
            del model.metadata_props[:]
            model.metadata_props.extend(kept)
        extra = self.new.graph.initializer[len(self.old.graph.initializer) :]
        if not all(_numbers(tensor) is not None for tensor in extra):
            return "graph.initializer"
        del self.new.graph.initializer[len(self.old.graph.initializer) :]
        constants = _constants(self.old), {**_constants(self.new), **_constants_of(extra)}
        return self._message(self.old, self.new, "model", constants)

    def _message(self, old: Message, new: Message, at: str, constants: Sequence[Mapping[str, Any]]) -> str | None:
        skipped = set()
        if isinstance(old, TensorProto):
            at = f"{at} {old.name}"
            skipped = {"external_data"} | ({"raw_data", "dims"} if old.name in self.vocabulary else set())
            if (before := _numbers(old)) is not None and (after := _numbers(new)) is not None:
                same_length = before.shape == after.shape and self._agree(before, after)
                skipped |= {"raw_data", "int64_data"} if same_length else set()
        for field in old.DESCRIPTOR.fields:
            if field.name in skipped:
                continue
            old_values, new_values = getattr(old, field.name), getattr(new, field.name)
            if not field.is_repeated:
                old_values, new_values = [old_values], [new_values]
            if len(old_values) != len(new_values) or (_has(old, field) != _has(new, field)):
                return f"{at}.{field.name}"
            for first, second in zip(old_values, new_values, strict=True):
                if field.message_type is None:
                    difference = None if self._scalars(first, second, constants) else f"{at}.{field.name}"
                elif not _has(old, field) and not field.is_repeated:
                    difference = None
                else:
                    difference = self._message(first, second, f"{at}.{field.name}", constants)
                if difference:
                    return difference
        return None

    def _scalars(self, old: Any, new: Any, constants: Sequence[Mapping[str, Any]]) -> bool:
        if old == new or (type(old) is int and (old, new) == self.sizes) or (old != old and new != new):
            return True
        # A constant may be named after its value.
        before, after = constants[0].get(old), constants[1].get(new)
        return before is not None and after is not None and self._agree(before, after)

    def _agree(self, old: Any, new: Any) -> bool:
        if old.shape != new.shape:
            return False
        grown = (old == self.sizes[0]) & (new == self.sizes[1])
        return bool(((old == new) | grown).all())


def _has(message: Message, field: Any) -> bool:
    return field.is_repeated or not field.has_presence or message.HasField(field.name)


def _constants(model: ModelProto) -> dict[str, Any]:
    return _constants_of(model.graph.initializer)


def _constants_of(tensors: Any) -> dict[str, Any]:
    values = ((tensor.name, _numbers(tensor)) for tensor in tensors)
    return {name: value for name, value in values if value is not None}


def _numbers(tensor: Any) -> Any:
    """Return the values of an int64 tensor that is stored inside the model file, or None for any other tensor.

    ONNX graphs store shapes and lengths as int64 tensors, which a patch may have to change.
    """
    if tensor.data_type != TensorProto.INT64 or tensor.data_location == TensorProto.EXTERNAL:
        return None
    return np.asarray(numpy_helper.to_array(tensor))
