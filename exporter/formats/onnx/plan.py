"""From a merged model to the layout of an ONNX folder: every byte's place is known before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from exporter.errors import NotExpressible
from exporter.families import describe
from exporter.families.spec import Attention, DecoderSpec, Mlp, Norm, Role, Rope
from exporter.formats.onnx.client_files import client_files
from exporter.formats.onnx.decoder import COS_CACHE, SIN_CACHE, path
from exporter.formats.onnx.rope import Float32, frequencies
from exporter.formats.slots import assign
from exporter.merge.model import MergedModel

#: Runtimes map the data file: a matrix that begins on a page shares none with its neighbour.
_PAGE_BYTES: Final = 4096
_PAGED_FROM_BYTES: Final = 64 << 10
#: Small tensors begin on a cache line.
_LINE_BYTES: Final = 64

_ITEM_BYTES: Final = 4  # every weight is float32

#: The parts of the decoder that the builder makes.
_ROLES: Final = frozenset(
    {Role.EMBED, Role.FINAL_NORM, Role.HEAD, Role.ATTN_NORM, Role.Q, Role.K, Role.V, Role.ATTN_OUT}
    | {Role.MLP_NORM, Role.GATE, Role.UP, Role.DOWN}
)

#: One row a token: kept as they are stored, so that a row stays one range of bytes, and one matrix can serve as both.
_BY_TOKEN: Final = (Role.EMBED, Role.HEAD)


@dataclass(frozen=True, slots=True)
class Item:
    """One initialiser in the data file: a stored tensor (``source``) under a rule, or a rotary cache (None).

    shape: as it is in the file. transposed: the stored matrix is (out, in), the file holds (in, out).
    """

    name: str
    shape: tuple[int, ...]
    offset_bytes: int
    rule: str
    source: str | None = None
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the initialiser."""
        return math.prod(self.shape) * _ITEM_BYTES


@dataclass(frozen=True)
class OnnxLayout:
    """The folder to be: initialisers in order, the files of the clients, and the size of the data file.

    dropped: stored tensor → rule, for those that are left out on purpose. freqs: the rotary frequencies.
    """

    model: MergedModel
    spec: DecoderSpec
    items: Sequence[Item]
    dropped: Mapping[str, str]
    freqs: Float32
    files: Mapping[str, bytes]
    nbytes: int


def plan_onnx(model: MergedModel) -> OnnxLayout:
    """Lay out the ONNX folder of ``model``, whose floats must be F32; reads shapes and small files, no weights.

    Raises NotExpressible for a model that no family describes or that is not float32, BadInput for tensors or
    settings that do not fit the config.
    """
    spec = describe(model.config, "onnx")
    rope = _buildable(spec)
    specs = model.specs
    kept, dropped = assign(model, specs, spec)
    items: list[Item] = []
    ledger = model.ledger()
    for name in sorted(kept, key=list(spec.forms[0]).index):
        stored, slot = specs[name], kept[name]
        if stored.dtype != "F32":
            raise NotExpressible(f"onnx: {model.path}: {name}", f"{stored.dtype} weights are not written, only F32")
        transposed = len(stored.shape) == 2 and slot.role not in _BY_TOKEN
        shape = stored.shape[::-1] if transposed else stored.shape
        rule = "transposed" if transposed else "copied"
        items.append(_place(items, path(slot.role, slot.layer, slot.part), shape, rule, name, transposed=transposed))
        ledger.take(name, rule)
    for name, rule in dropped.items():
        ledger.take(name, rule)
    ledger.close()
    for name in (COS_CACHE, SIN_CACHE):
        items.append(_place(items, name, (spec.max_positions, rope.dims // 2), "computed"))
    nbytes = items[-1].offset_bytes + items[-1].nbytes
    freqs = frequencies(rope, spec.max_positions)
    return OnnxLayout(model, spec, items, dropped, freqs, client_files(model, spec), nbytes)


def _buildable(spec: DecoderSpec) -> Rope:
    """The rotary embedding of a decoder that the graph builder covers in all its parts.

    Everything that it uses is copied into a plain decoder; a field that then still differs is one that the graph
    would leave out. Raises NotExpressible for such a one, so that a new field can never be ignored in silence.
    """
    attention = spec.attention
    plain = DecoderSpec(
        family=spec.family,
        vocab=spec.vocab,
        hidden=spec.hidden,
        layers=spec.layers,
        max_positions=spec.max_positions,
        norm=Norm(kind="rms", eps=spec.norm.eps),
        rope=None,
        attention=Attention(
            heads=attention.heads, kv_heads=attention.kv_heads, head_dim=attention.head_dim, scale=attention.scale
        ),
        mlp=Mlp(inner=spec.mlp.inner, activation="silu"),
        forms=spec.forms,
    )
    rope = spec.rope
    if rope is not None:
        used = Rope(
            dims=attention.head_dim, theta=rope.theta, scaling=rope.scaling, original_positions=rope.original_positions
        )
        plain = replace(plain, rope=used)
    odd = [field.name for field in fields(spec) if getattr(spec, field.name) != getattr(plain, field.name)]
    odd += sorted(role.name.lower() for role in spec.roles ^ _ROLES)
    if odd or rope is None:
        raise NotExpressible(
            f"onnx: {spec.family}",
            f"this version builds no graph with this model's {', '.join(odd)}",
            instead="--to hf and --to gguf can hold it",
        )
    return rope


def _place(
    before: Sequence[Item],
    name: str,
    shape: tuple[int, ...],
    rule: str,
    source: str | None = None,
    *,
    transposed: bool = False,
) -> Item:
    """The next item behind ``before``, aligned."""
    end = before[-1].offset_bytes + before[-1].nbytes if before else 0
    large = math.prod(shape) * _ITEM_BYTES >= _PAGED_FROM_BYTES
    return Item(name, shape, end + -end % (_PAGE_BYTES if large else _LINE_BYTES), rule, source, transposed)
