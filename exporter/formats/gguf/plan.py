"""From a merged model to the layout of a GGUF: every byte's place is known before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from exporter.errors import BadInput, NotExpressible
from exporter.families import describe
from exporter.families.config import Settings
from exporter.families.spec import DecoderSpec, Role, Rope, Slot
from exporter.formats.gguf import metadata, writer
from exporter.formats.gguf.names import Architecture, architecture, tensor_name
from exporter.formats.gguf.quantise import FILE_TYPES
from exporter.formats.gguf.tokenizer import vocabulary
from exporter.formats.gguf.writer import Key, TensorEntry
from exporter.formats.slots import assign
from exporter.merge.model import MergedModel
from exporter.tensors import FLOATS, Array, TensorSpec

#: llama.cpp's converter writes this flag for llama models of this vocabulary (SmolLM, small granites), whatever the
#: tokenizer says; they do not start texts with a token.
_NO_BOS_VOCAB: Final = 49152


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the file: a stored tensor (``source``) under a rule, or a ``value`` that no checkpoint holds.

    heads: rows are reordered head by head for so many heads; 0 leaves them.
    """

    entry: TensorEntry
    rule: str
    source: str | None = None
    heads: int = 0
    value: Array | None = None


@dataclass(frozen=True)
class GgufLayout:
    """The file to be: header bytes, tensors in order, its size.

    dropped: stored tensor → rule, for those that are left out on purpose. notes: what the format cannot say.
    """

    model: MergedModel
    ftype: str
    header: bytes
    items: Sequence[Item]
    dropped: Mapping[str, str]
    nbytes: int
    notes: Sequence[str]


def plan_gguf(model: MergedModel, ftype: str | None = None, *, pre_tokenizer: str | None = None) -> GgufLayout:
    """Lay out the GGUF of ``model``; reads shapes and the tokenizer, no weights.

    ftype: F32, F16, BF16 or Q8_0; None keeps the dtype in which the matrices are stored. pre_tokenizer: llama.cpp's
    name for the splitting, where it is not recognised from the tokenizer.
    Raises NotExpressible for an unknown family, tokenizer or type, BadInput for tensors that do not fit the config.
    """
    spec = describe(model.config, "gguf")
    arch = architecture(spec.family)
    if spec.rope.dims % 2:
        raise BadInput(f"{model.path}: config.json: head_dim: expected an even number, found {spec.rope.dims}")
    specs = model.specs
    kept, dropped = assign(model, specs, spec)
    ftype = _file_type(model, [specs[name] for name in kept], ftype)
    items = _extra_items(spec.rope) + [_item(specs[name], slot, spec, arch, ftype) for name, slot in kept.items()]
    ledger = model.ledger()
    for item in items:
        if item.source is not None:
            ledger.take(item.source, item.rule)
    for name, rule in dropped.items():
        ledger.take(name, rule)
    ledger.close()
    tokens = vocabulary(model.files, model.config, spec.vocab, where=model.path, pre_tokenizer=pre_tokenizer)
    entries = [item.entry for item in items]
    keys = _keys(model, spec, arch, ftype, entries, tokens.keys)
    header, nbytes = writer.header(keys, entries)
    return GgufLayout(model, ftype, header, items, dropped, nbytes, tokens.notes)


def _file_type(model: MergedModel, specs: Sequence[TensorSpec], ftype: str | None) -> str:
    for spec in specs:
        if spec.dtype not in FLOATS:
            raise NotExpressible(
                f"gguf: {model.where(spec.name)}: {spec.name}",
                f"stored as {spec.dtype}; only {', '.join(sorted(FLOATS))} are written",
            )
    if ftype is not None:
        if ftype not in FILE_TYPES:
            known = ", ".join(FILE_TYPES)
            raise NotExpressible(
                "gguf",
                f"this version writes {known}, not {ftype}",
                instead=f"write F32 and run llama-quantize with {ftype}",
            )
        return ftype
    stored = sorted({spec.dtype for spec in specs if len(spec.shape) > 1})
    if len(stored) != 1 or stored[0] not in FILE_TYPES:
        raise NotExpressible(
            f"gguf: {model.path}",
            f"the matrices are stored as {' and '.join(stored)}, which is not one type of GGUF",
            instead="--dtype f32|f16|bf16 chooses one",
        )
    return stored[0]


def _item(stored: TensorSpec, slot: Slot, spec: DecoderSpec, arch: Architecture, ftype: str) -> Item:
    kind = ftype
    if len(stored.shape) < 2:
        kind = "F32"  # llama.cpp computes norms and biases in float32 only
    elif not writer.fits(kind, stored.shape[-1]):
        kind = "F16"  # the converter's fallback for rows that do not come in whole blocks
    heads = {Role.Q: spec.attention.heads, Role.K: spec.attention.kv_heads}.get(slot.role, 0) if arch.interleaved else 0
    rule = "copied" if kind == stored.dtype else f"{stored.dtype} to {kind}"
    rule += ", rows in interleaved rotary order" if heads else ""
    return Item(TensorEntry(tensor_name(slot), kind, stored.shape), rule, source=stored.name, heads=heads)


def _extra_items(rope: Rope) -> list[Item]:
    """The factors by which llama3 scaling divides each rotary frequency, as a tensor.

    Source: Llama 3.1's apply_scaling: frequencies above the high threshold stay, those below the low one are divided
    by ``factor``, those between are blended.
    """
    scaling = rope.scaling or {}
    if scaling.get("rope_type") != "llama3":
        return []
    numbers = Settings(scaling)
    factor, low = numbers.number("factor", 8.0), numbers.number("low_freq_factor", 1.0)
    high, context = numbers.number("high_freq_factor", 4.0), numbers.number("original_max_position_embeddings", 8192)
    if high <= low:
        raise BadInput(f"config.json: high_freq_factor: expected more than low_freq_factor ({low}), found {high}")
    # In float32 and in the converter's order of operations: the bytes are compared.
    steps = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    freqs = np.float32(1) / np.power(np.float32(rope.theta), steps)
    waves = np.float32(2 * math.pi) / freqs
    smooth = (np.float32(context) / waves - np.float32(low)) / np.float32(high - low)
    blended = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    values = np.where(waves < context / high, 1, np.where(waves > context / low, factor, blended)).astype(np.float32)
    return [Item(TensorEntry("rope_freqs.weight", "F32", values.shape), "computed", value=values)]


def _keys(
    model: MergedModel,
    spec: DecoderSpec,
    arch: Architecture,
    ftype: str,
    entries: Sequence[TensorEntry],
    tokenizer: Sequence[Key],
) -> list[Key]:
    parameters = sum(math.prod(entry.shape) for entry in entries)
    tokenizer = list(tokenizer)
    if arch.name == "llama" and spec.vocab == _NO_BOS_VOCAB:
        flag = writer.truth("tokenizer.ggml.add_bos_token", False)
        tokenizer = [key for key in tokenizer if key.name != flag.name] + [flag]
    return [
        *metadata.general_keys(arch.name, metadata.model_name(model.path), parameters, model.generation_config),
        *metadata.decoder_keys(arch.name, spec, ftype),
        *tokenizer,
        *metadata.provenance_keys(model.provenance),
    ]
