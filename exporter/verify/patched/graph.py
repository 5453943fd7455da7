"""Two graphs of one model, before and after a patch: what may differ is the length of the vocabulary, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.protobuf.message import Message  # type: ignore[import-untyped]  # protobuf ships no stubs
from onnx import ModelProto, TensorProto, numpy_helper

#: Keys that tell which adapters went in, and where the base is from.
_ORIGINS: Final = ("ttexport.adapter", "ttexport.base.repo", "ttexport.base.revision")


@dataclass(frozen=True)
class GraphPair:
    """vocabulary: initialisers whose bytes, lengths and places are judged elsewhere. sizes: tokens before and after."""

    old: ModelProto
    new: ModelProto
    vocabulary: Set[str]
    sizes: tuple[int, int]

    def difference(self) -> str | None:
        """Where the two differ in more than they may, by the names of fields; None where they do not."""
        for model in (self.old, self.new):
            kept = [prop for prop in model.metadata_props if not prop.key.startswith(_ORIGINS)]
            del model.metadata_props[:]
            model.metadata_props.extend(kept)
        extra = self.new.graph.initializer[len(self.old.graph.initializer) :]
        if not all(_numbers(one) is not None for one in extra):
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
            one, other = getattr(old, field.name), getattr(new, field.name)
            if not field.is_repeated:
                one, other = [one], [other]
            if len(one) != len(other) or (_has(old, field) != _has(new, field)):
                return f"{at}.{field.name}"
            for first, second in zip(one, other, strict=True):
                if field.message_type is None:
                    wrong = None if self._scalars(first, second, constants) else f"{at}.{field.name}"
                elif not _has(old, field) and not field.is_repeated:
                    wrong = None
                else:
                    wrong = self._message(first, second, f"{at}.{field.name}", constants)
                if wrong:
                    return wrong
        return None

    def _scalars(self, old: Any, new: Any, constants: Sequence[Mapping[str, Any]]) -> bool:
        if old == new or (type(old) is int and (old, new) == self.sizes) or (old != old and new != new):
            return True
        # A constant may be called by what it says.
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
    found = ((one.name, _numbers(one)) for one in tensors)
    return {name: value for name, value in found if value is not None}


def _numbers(tensor: Any) -> Any:
    """Of an int64 tensor inside the model: shapes and lengths are such."""
    if tensor.data_type != TensorProto.INT64 or tensor.data_location == TensorProto.EXTERNAL:
        return None
    return np.asarray(numpy_helper.to_array(tensor))
