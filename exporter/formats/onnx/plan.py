"""Plan the ONNX folder of a merged model. The file offset of every initialiser is computed before weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from exporter.errors import NotExpressible
from exporter.families import describe
from exporter.families.spec import DecoderSpec, Role, Slot
from exporter.formats.onnx.client_files import client_files
from exporter.formats.onnx.graph.modules import path
from exporter.formats.onnx.weights.initialisers import Initialiser, in_blocks, in_floats, rotary_cache
from exporter.formats.onnx.weights.packing import Group, packed
from exporter.formats.onnx.weights.placing import aligned
from exporter.formats.onnx.weights.precision import PRECISIONS, Precision
from exporter.formats.onnx.weights.rope import tables
from exporter.formats.slots import EXPERTS, NORMS, assign, naming_schemes
from exporter.formats.views import Regrouped, Shifted, Stacked
from exporter.merge.model import MergedModel
from exporter.tensors import DTYPES, LazyTensor

#: Roles with a row per token or position. The matrices are stored untransposed, so that a row is a single byte range,
#: and so that embedding and head can share a matrix.
_BY_ROW: Final = (Role.EMBED, Role.HEAD, Role.POSITIONS)


@dataclass(frozen=True, slots=True)
class PlacedInitialiser:
    """An initialiser and the initialiser's offset in the external data file.

    sources: names of the checkpoint tensors that are written with this initialiser. The names are empty if another
    initialiser, such as the codes of the same matrix, already lists the tensors.
    """

    value: Initialiser
    offset_bytes: int
    sources: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the initialiser in bytes."""
        return math.prod(self.value.shape) * DTYPES[self.value.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Variant:
    """The model in one precision, with the model's initialisers in the order of the external data file."""

    precision: Precision
    initialisers: Sequence[PlacedInitialiser]

    @property
    def nbytes(self) -> int:
        """Size of the external data file in bytes."""
        return self.initialisers[-1].offset_bytes + self.initialisers[-1].nbytes


@dataclass(frozen=True)
class OnnxLayout:
    """The plan of an ONNX folder: a graph and external data for each precision, and the config and tokenizer files.

    ops: "standard" or "ort". dropped: maps the name of each checkpoint tensor that is omitted on purpose to the reason.
    """

    model: MergedModel
    spec: DecoderSpec
    variants: Sequence[Variant]
    ops: str
    dropped: Mapping[str, str]
    files: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """Size of all external data files in bytes."""
        return sum(variant.nbytes * len(variant.precision.stems) for variant in self.variants)


def plan_onnx(
    model: MergedModel, precisions: Sequence[Precision] = (PRECISIONS["fp32"],), *, ops: str = "standard"
) -> OnnxLayout:
    """Plan the ONNX folder of ``model``, which must be in F32.

    Planning reads tensor shapes and small files, but no weights.
    ops: "standard", or "ort" for fused operators that exist only in ONNX Runtime.
    Raises NotExpressible if the model's family is not supported or the model is not in float32. Raises BadInput if
    tensors contradict the config or settings in the config are inconsistent.
    """
    spec = describe(model.config, "onnx")
    kept, dropped = assign(model, model.specs, spec)
    places = {name: number for scheme in naming_schemes(spec) for number, name in enumerate(scheme)}
    groups: dict[tuple[Role, int | None, str], list[str]] = {}
    ledger = model.ledger()
    for name in sorted(kept, key=places.__getitem__):
        slot = kept[name]
        if (dtype := model.specs[name].dtype) != "F32":
            raise NotExpressible(f"onnx: {model.path}: {name}", f"expected F32 weights, found {dtype}")
        groups.setdefault((slot.role, slot.layer, slot.parameter), []).append(name)
        ledger.take(name, "written")
    for name, rule in dropped.items():
        ledger.take(name, rule)
    ledger.close()
    slots = [(names, kept[names[0]]) for names in groups.values()]
    variants = [_variant(model, spec, slots, precision, ops) for precision in precisions]
    files = client_files(model, spec, precisions, shared_cache=ops == "ort")
    return OnnxLayout(model, spec, variants, ops, dropped, files)


def _variant(model: MergedModel, spec: DecoderSpec, slots: Sequence[Group], precision: Precision, ops: str) -> Variant:
    placed: list[PlacedInitialiser] = []
    for names, slot in packed(slots, spec, precision) if ops == "ort" else slots:
        sources = tuple(names)
        for value in _values(model, spec, names, slot, precision):
            placed.append(_placed(placed, value, sources))
            sources = ()  # codes, scales and zero points share a source tensor, which is counted once, for the codes
    for table in tables(spec.rope, spec.max_positions) if spec.rope else ():
        for part in ("cos", "sin"):
            name = f"{table.name}.{part}_cache"
            cache = rotary_cache(name, part, table, spec.max_positions, precision.floats)
            placed.append(_placed(placed, cache))
    return Variant(precision, placed)


def _values(
    model: MergedModel, spec: DecoderSpec, names: Sequence[str], slot: Slot, precision: Precision
) -> Sequence[Initialiser]:
    """Make the ONNX initialisers of one weight from the checkpoint tensors ``names``."""
    role, rules = slot.role, []
    tensors: list[LazyTensor] = [model.tensor(name) for name in names]
    if role is Role.QKV and spec.attention.qkv == "heads":
        tensors = [Regrouped(tensor, spec.attention.heads) for tensor in tensors]
        rules.append("rows reordered from head by head to all queries, all keys, all values")
    if role is Role.QKV and len(tensors) > 1:
        tensors = [Stacked(tensors)]
        rules.append("queries, keys and values packed into a single matrix")
    if role in NORMS and slot.parameter == "weight" and spec.norm.offset:
        tensors = [Shifted(tensor, spec.norm.offset) for tensor in tensors]
        rules.append(f"plus the norm offset {spec.norm.offset:g}")
    shape = tensors[0].spec.shape
    stacked = role in EXPERTS or len(tensors) > 1
    in_out = role in spec.transposed
    form = precision.form(slot, shape[::-1] if in_out else shape, spec.layers)
    if form and (role in EXPERTS or not stacked):
        rules += [f"quantised to {form.bits} bits in blocks"] + ["stacked"] * stacked
        rule = ", ".join(rules)
        return in_blocks(
            path(role, slot.layer), tensors, form, precision.floats, rule, transposed=in_out, stacked=stacked
        )
    transposed = len(shape) == 2 and role not in (*_BY_ROW, *NORMS) and not in_out
    rules += ["transposed"] * transposed + ["stacked"] * stacked
    rules += [] if precision.floats == "F32" else [f"rounded to {precision.floats}"]
    name, rule = path(role, slot.layer, slot.parameter), ", ".join(rules) or "copied"
    return [in_floats(name, tensors, precision.floats, rule, transposed=transposed, stacked=stacked)]


def _placed(
    before: Sequence[PlacedInitialiser], value: Initialiser, sources: tuple[str, ...] = ()
) -> PlacedInitialiser:
    """Place ``value`` at the next aligned offset of the external data file, after the initialisers ``before``."""
    end = before[-1].offset_bytes + before[-1].nbytes if before else 0
    placed = PlacedInitialiser(value, end, sources)
    return replace(placed, offset_bytes=aligned(end, placed.nbytes))
