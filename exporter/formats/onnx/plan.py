"""From a merged model to the layout of an ONNX folder: every byte's place is known before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from exporter.errors import NotExpressible
from exporter.families import describe
from exporter.families.spec import DecoderSpec, Role, Slot
from exporter.formats.onnx.client_files import client_files
from exporter.formats.onnx.parts import path
from exporter.formats.onnx.rope import Table, tables
from exporter.formats.slots import assign
from exporter.formats.views import Regrouped, Shifted
from exporter.merge.model import MergedModel
from exporter.tensors import LazyTensor

#: Runtimes map the data file: a matrix that begins on a page shares none with its neighbour.
_PAGE_BYTES: Final = 4096
_PAGED_FROM_BYTES: Final = 64 << 10
#: Small tensors begin on a cache line.
_LINE_BYTES: Final = 64

_ITEM_BYTES: Final = 4  # every weight is float32

#: One row a token or position: kept as they are stored, so that a row stays one range of bytes, and one matrix can
#: serve as embedding and head.
_BY_ROW: Final = (Role.EMBED, Role.HEAD, Role.POSITIONS)
_NORMS: Final = frozenset(role for role in Role if role.name.endswith("NORM"))
_EXPERTS: Final = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


@dataclass(frozen=True, slots=True)
class Item:
    """One initialiser in the data file: made of stored tensors under a rule, or a rotary cache (``table``).

    shape: as it is in the file. tensors: the stored tensors as they go in, one after the other. transposed: each is a
    matrix (out, in), the file holds (in, out). sources: their names. part: of a rotary cache, "cos" or "sin".
    """

    name: str
    shape: tuple[int, ...]
    offset_bytes: int
    rule: str
    sources: tuple[str, ...] = ()
    tensors: tuple[LazyTensor, ...] = ()
    transposed: bool = False
    table: Table | None = None
    part: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the initialiser."""
        return math.prod(self.shape) * _ITEM_BYTES


@dataclass(frozen=True)
class OnnxLayout:
    """The folder to be: initialisers in order, the files of the clients, and the size of the data file.

    dropped: stored tensor → rule, for those that are left out on purpose.
    """

    model: MergedModel
    spec: DecoderSpec
    items: Sequence[Item]
    dropped: Mapping[str, str]
    files: Mapping[str, bytes]
    nbytes: int


def plan_onnx(model: MergedModel) -> OnnxLayout:
    """Lay out the ONNX folder of ``model``, whose floats must be F32; reads shapes and small files, no weights.

    Raises NotExpressible for a model that no family describes or that is not float32, BadInput for tensors or
    settings that do not fit the config.
    """
    spec = describe(model.config, "onnx")
    kept, dropped = assign(model, model.specs, spec)
    places = {name: number for form in spec.forms for number, name in enumerate(form)}
    groups: dict[tuple[Role, int | None, str], list[str]] = {}
    for name in sorted(kept, key=places.__getitem__):
        slot = kept[name]
        groups.setdefault((slot.role, slot.layer, slot.part), []).append(name)
    items: list[Item] = []
    ledger = model.ledger()
    for names in groups.values():
        items.append(_placed(items, _item(model, spec, names, kept[names[0]])))
        for name in names:
            ledger.take(name, items[-1].rule)
    for name, rule in dropped.items():
        ledger.take(name, rule)
    ledger.close()
    for table in tables(spec.rope, spec.max_positions) if spec.rope else ():
        shape = (spec.max_positions, len(table.freqs))
        for part in ("cos", "sin"):
            cache = Item(f"{table.name}.{part}_cache", shape, 0, "computed", table=table, part=part)
            items.append(_placed(items, cache))
    nbytes = items[-1].offset_bytes + items[-1].nbytes
    return OnnxLayout(model, spec, items, dropped, client_files(model, spec), nbytes)


def _item(model: MergedModel, spec: DecoderSpec, names: Sequence[str], slot: Slot) -> Item:
    """The initialiser that the stored tensors ``names`` make, not yet placed."""
    role, rules = slot.role, []
    for name in names:
        if (dtype := model.specs[name].dtype) != "F32":
            raise NotExpressible(f"onnx: {model.path}: {name}", f"{dtype} weights are not written, only F32")
    tensors: list[LazyTensor] = [model.tensor(name) for name in names]
    if role is Role.QKV and spec.attention.qkv == "heads":
        tensors = [Regrouped(tensor, spec.attention.heads) for tensor in tensors]
        rules.append("queries, keys and values apart")
    if role in _NORMS and slot.part == "weight" and spec.norm.offset:
        tensors = [Shifted(tensor, spec.norm.offset) for tensor in tensors]
        rules.append(f"plus {spec.norm.offset:g}")
    shape = tensors[0].spec.shape
    transposed = len(shape) == 2 and role not in (*_BY_ROW, *_NORMS) and role not in spec.transposed
    if transposed:
        shape = shape[::-1]
        rules.append("transposed")
    if role in _EXPERTS or len(tensors) > 1:
        shape = (len(tensors), *shape)
        rules.append("stacked")
    rule = ", ".join(rules) or "copied"
    return Item(path(role, slot.layer, slot.part), shape, 0, rule, tuple(names), tuple(tensors), transposed)


def _placed(before: Sequence[Item], item: Item) -> Item:
    """``item`` behind ``before``, aligned."""
    end = before[-1].offset_bytes + before[-1].nbytes if before else 0
    alignment = _PAGE_BYTES if item.nbytes >= _PAGED_FROM_BYTES else _LINE_BYTES
    return replace(item, offset_bytes=end + -end % alignment)
