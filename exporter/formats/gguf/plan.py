"""Plan the GGUF of a merged model. The offset of every tensor in the file is computed before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from exporter.errors import NotExpressible, TensorMismatch
from exporter.families import describe
from exporter.families.llama_cpp import Architecture
from exporter.families.spec import DecoderSpec, Role, Slot
from exporter.formats.gguf import metadata, writer
from exporter.formats.gguf.architectures import architecture, check_biases, notes
from exporter.formats.gguf.in_llama_cpp.general_name import general_name
from exporter.formats.gguf.names import tensor_name
from exporter.formats.gguf.quantisation.file_types import NATIVE_FILE_TYPES
from exporter.formats.gguf.quantisation.tensor_types import native_type
from exporter.formats.gguf.rope_factors import rope_factors
from exporter.formats.gguf.vocab.tokenizer import vocabulary
from exporter.formats.gguf.writer import Key, TensorEntry
from exporter.formats.slots import EXPERTS, NORMS, assign
from exporter.formats.views import Interleaved, Regrouped, Shifted, Stacked, Transposed
from exporter.merge.model import MergedModel
from exporter.tensors import FLOATS, Array, LazyTensor, TensorSpec

#: Vocabulary size of Llama models without a BOS token at the start of a text (SmolLM, small Granites). llama.cpp's
#: converter writes add_bos_token = false for this vocabulary size, even if the tokenizer's files give another value.
NO_BOS_VOCAB: Final = 49152


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A planned GGUF tensor: either a conversion of the checkpoint tensors ``sources``, or the array ``value``.

    rule: a text that describes the conversion. tensor: the lazy tensor whose rows are encoded in the GGUF type, or None
    if ``value`` is given.
    """

    entry: TensorEntry
    rule: str
    sources: tuple[str, ...] = ()
    tensor: LazyTensor | None = None
    value: Array | None = None


@dataclass(frozen=True)
class GgufLayout:
    """The planned GGUF: its metadata keys, and its tensors in file order.

    keys: all metadata keys except provenance. dropped: maps the name of each checkpoint tensor that is left out on
    purpose to the reason. notes: properties of the model that a GGUF cannot represent.
    """

    model: MergedModel
    ftype: str
    keys: Sequence[Key]
    tensors: Sequence[PlannedTensor]
    dropped: Mapping[str, str]
    notes: Sequence[str]

    @property
    def entries(self) -> Sequence[TensorEntry]:
        """The entries of all tensors, in file order."""
        return [tensor.entry for tensor in self.tensors]

    @cached_property
    def header_nbytes(self) -> int:
        """Size in bytes of everything before the data section."""
        return len(self.draft_header())

    @property
    def nbytes(self) -> int:
        """Size of the whole GGUF in bytes."""
        return self.header_nbytes + sum(writer.padded(entry.nbytes) for entry in self.entries)

    def draft_header(self) -> bytes:
        """Return a GGUF header of the final length, with placeholders for all values that depend on the weights."""
        return self._header(self.model.provenance_shape)

    def header(self) -> bytes:
        """Return all bytes of the GGUF before the data section.

        The base model's embedding is read once, because the header contains a digest of the embedding.
        """
        return self._header(self.model.provenance)

    def _header(self, provenance: Mapping[str, str]) -> bytes:
        recorded = {**provenance, "rows.dtype": _rows_dtype(self.model, self.ftype)}
        keys = [*self.keys, *metadata.provenance_keys(recorded)]
        return writer.header(keys, [tensor.entry for tensor in self.tensors])[0]


def plan_gguf(
    model: MergedModel, ftype: str | None = None, *, pre_tokenizer: str | None = None, mixed: str | None = None
) -> GgufLayout:
    """Plan the GGUF of ``model``. The function reads tensor shapes and the tokenizer, but no weights.

    ftype: the file type (F32, F16, BF16 or Q8_0), or None to keep the stored dtype of the matrices. pre_tokenizer:
    llama.cpp's name of the pre-tokenizer, to be written instead of the name that ttexport recognises. mixed: the file
    type to use if the model's matrices have several dtypes; if ``mixed`` is None, a model with several dtypes raises an
    error.
    Raises NotExpressible if the model family, the tokenizer or ``ftype`` is not supported, and BadInput if the tensors
    contradict the config.
    """
    spec = describe(model.config, "gguf")
    row = architecture(spec, tied=model.tie.tied)
    specs = model.specs
    kept, dropped = assign(model, specs, spec)
    check_biases(row, kept.values())
    ftype = _file_type(model, [specs[name] for name in kept], ftype, mixed)
    tensors = _rope_factors(spec) + [_planned(model, names, slot, spec, row, ftype) for slot, names in _targets(kept)]
    ledger = model.ledger()
    for tensor in tensors:
        for name in tensor.sources:
            ledger.take(name, tensor.rule)
    for name, rule in dropped.items():
        ledger.take(name, rule)
    ledger.close()
    named = general_name(model.path, model.files)
    tokens = vocabulary(
        model.files,
        model.config,
        spec.vocab,
        where=model.path,
        pre_tokenizer=pre_tokenizer,
        generation=model.generation_config,
        templates=model.templates,
        strips=named.exact,
    )
    keys = _keys(model, named.text, spec, row, ftype, [tensor.entry for tensor in tensors], tokens.keys)
    return GgufLayout(model, ftype, keys, tensors, dropped, [*tokens.notes, *notes(spec, row)])


def _targets(kept: Mapping[str, Slot]) -> list[tuple[Slot, list[str]]]:
    """Return a pair (slot, names of the checkpoint tensors to convert) for each tensor of the GGUF, in file order.

    A slot gives the tensor's role and layer. Tensors that the checkpoint stores separately for each expert or head are
    stacked into one GGUF tensor, ordered by expert or head number. The file order is the order of llama.cpp's
    converter, which writes a stacked tensor as soon as all parts of the stack have been read. The converter writes a
    layer's stacked expert tensors one after another, in the order in which the tensors of the layer's first expert are
    stored.
    """
    groups: dict[Slot, dict[int, str]] = {}
    last: dict[Slot, tuple[int, int]] = {}
    last_experts: dict[int | None, int] = {}
    for number, (name, slot) in enumerate(kept.items()):
        target = replace(slot, member=None)
        groups.setdefault(target, {})[slot.member or 0] = name
        last[target] = (number, 0)
        if slot.role in EXPERTS:
            last_experts[slot.layer] = number
    for target in last:
        if target.role in EXPERTS:
            of_layer = [slot for slot in groups if slot.layer == target.layer and slot.role in EXPERTS]
            of_layer.sort(key=lambda slot: groups[slot][0])
            last[target] = (last_experts[target.layer], of_layer.index(target))
    order = sorted(groups, key=lambda target: last[target])
    return [(target, [groups[target][member] for member in sorted(groups[target])]) for target in order]


def _file_type(model: MergedModel, specs: Sequence[TensorSpec], ftype: str | None, mixed: str | None) -> str:
    for spec in specs:
        if spec.dtype not in FLOATS:
            raise NotExpressible(
                f"gguf: {model.where(spec.name)}: {spec.name}",
                f"expected one of the dtypes {', '.join(sorted(FLOATS))}, found {spec.dtype}",
            )
    if ftype is not None:
        if ftype not in NATIVE_FILE_TYPES:
            known = ", ".join(NATIVE_FILE_TYPES)
            raise NotExpressible(
                "gguf",
                f"expected the file type {known}, or a llama.cpp quantisation such as Q4_K_M or Q6_K, found {ftype}",
            )
        return ftype
    stored = sorted({spec.dtype for spec in specs if len(spec.shape) > 1})
    if mixed is not None and len(stored) > 1:
        return mixed
    if len(stored) != 1 or stored[0] not in NATIVE_FILE_TYPES:
        raise NotExpressible(
            f"gguf: {model.path}",
            f"expected all matrices in a single dtype that GGUF supports, found {' and '.join(stored)}",
            instead="use --dtype f32, f16 or bf16 to convert the matrices",
        )
    return stored[0]


def _planned(
    model: MergedModel, names: Sequence[str], slot: Slot, spec: DecoderSpec, row: Architecture, ftype: str
) -> PlannedTensor:
    stored = model.specs[names[0]]
    tensor, change = _view(model, names, slot, spec, row)
    shape = tensor.spec.shape if len(names) == 1 else (len(names), *stored.shape)
    tensor_type = native_type(ftype, slot, shape)
    rule = "copied" if tensor_type == stored.dtype else f"{stored.dtype} to {tensor_type}"
    return PlannedTensor(TensorEntry(tensor_name(slot, row), tensor_type, shape), rule + change, tuple(names), tensor)


def _view(
    model: MergedModel, names: Sequence[str], slot: Slot, spec: DecoderSpec, row: Architecture
) -> tuple[LazyTensor, str]:
    """Return (a view of the tensors in llama.cpp's layout, a text that describes how the layout changed)."""
    tensor = model.tensor(names[0])
    if len(names) > 1:
        if len({model.specs[name].dtype for name in names}) > 1:
            first = model.specs[names[0]].dtype
            odd = next(name for name in names if model.specs[name].dtype != first)
            raise TensorMismatch(
                model.where(odd), odd, expected=f"{first}, the dtype of {names[0]}", found=model.specs[odd].dtype
            )
        return Stacked(
            [model.tensor(name) for name in names]
        ), f", stacked with other tensors into one tensor ({len(names)} in total)"
    if spec.norm.offset and slot.role in NORMS and slot.parameter == "weight":
        return Shifted(tensor, spec.norm.offset), f", plus the norm offset {spec.norm.offset:g}"
    if slot.role in spec.transposed and slot.parameter == "weight":
        return Transposed(tensor), ", transposed"
    return row_order(tensor, slot, spec, row)


def row_order(tensor: LazyTensor, slot: Slot, spec: DecoderSpec, row: Architecture) -> tuple[LazyTensor, str]:
    """Return (a view of ``tensor`` with its rows in llama.cpp's order, a text that describes how the order changed)."""
    attention = spec.attention
    if slot.role is Role.QKV and attention.qkv == "heads":
        return Regrouped(
            tensor, attention.heads
        ), ", rows reordered from head by head to all queries, all keys, all values"
    heads = {Role.Q: attention.heads, Role.K: attention.kv_heads}.get(slot.role)
    if heads and row.interleaved and spec.rope and not spec.rope.interleaved:
        return Interleaved(tensor, heads), ", rows reordered for llama.cpp's interleaved rotary embedding"
    return tensor, ""


def _rope_factors(spec: DecoderSpec) -> list[PlannedTensor]:
    return [
        PlannedTensor(TensorEntry(name, "F32", value.shape), "computed", value=value)
        for name, value in rope_factors(spec).items()
    ]


def _keys(
    model: MergedModel,
    name: str,
    spec: DecoderSpec,
    row: Architecture,
    ftype: str,
    entries: Sequence[TensorEntry],
    tokenizer: Sequence[Key],
) -> list[Key]:
    if "vocab_size" in row.keys and spec.vocab == NO_BOS_VOCAB:
        flag = writer.truth("tokenizer.ggml.add_bos_token", False)
        tokenizer = [*(key for key in tokenizer if key.name != flag.name), flag]
    return [
        *metadata.general_keys(row.name, name, metadata.size_class(entries), model.generation_config),
        *metadata.decoder_keys(row, spec, ftype, head_length=model.config.get("head_dim") is not None),
        *tokenizer,
    ]


def _rows_dtype(model: MergedModel, ftype: str) -> str:
    """Return the dtype to which trained token rows are rounded before being encoded in the embedding's GGUF type.

    The dtype is recorded in the GGUF, so that a later ``ttexport patch`` can repeat the rounding. If a float32 model is
    written to a GGUF in F16 or BF16, the rows are rounded to the type of the GGUF, otherwise to the model's dtype.
    """
    dtype = model.specs[model.tie.embedding].dtype
    return ftype if dtype == "F32" and ftype in FLOATS else dtype
