"""A vocabulary matrix of an ONNX model of any tool: how it stores the row of a token, and where.

One row a token (V, H), one column a token (H, V), or codes in blocks with scales and zero points, one row a token each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from exporter.errors import NotExpressible
from exporter.formats.onnx.weights.blocks import Blocks
from exporter.patch.onnx.scaled import Scaled
from exporter.sources.onnx.file import OnnxFile
from exporter.sources.onnx.tensors import TensorRange
from exporter.tensors import DTYPES, FLOATS, Array, cast


@dataclass(frozen=True)
class Matrix:
    """The matrix ``name`` of ``file``. form, scaled: how its codes are made, None and None for values.

    parts: the initialisers that hold it.
    """

    file: OnnxFile
    name: str
    form: Blocks | None
    scaled: Scaled | None
    parts: Sequence[TensorRange]

    @classmethod
    def of(cls, file: OnnxFile, name: str) -> Matrix:
        """Raises NotExpressible for a storage that is not understood."""
        found = cls(file, name, _form(file, name), Scaled.of(file, name), file.stored_tensors(name))
        found._check()
        return found

    @property
    def n_tokens(self) -> int:
        """Rows of the vocabulary."""
        return self.file.tokens(self.name)

    @property
    def axis(self) -> int:
        """The axis of ``parts`` that counts tokens."""
        return self.file.token_axis[self.name]

    @property
    def hidden(self) -> int:
        """Width of a row of values."""
        whole = self.parts[0]
        if self.form:
            return whole.nbytes * 8 // self.form.bits // self.n_tokens
        return math.prod(whole.shape) // self.n_tokens

    @property
    def kind(self) -> str:
        """The storage in words: a dtype, or bits, block size and dtype of the scales."""
        if self.scaled:
            return f"{self.scaled.dtype} with one scale"
        if self.form is None:
            return self.parts[0].dtype
        zeros = "" if self.form.symmetric else " with zero points"
        return f"int{self.form.bits} x {self.form.size}{zeros}, scales {self.parts[1].dtype}"

    def encode(self, rows: Array) -> list[Array]:
        """``rows`` (k, hidden) as they are stored, (k, bytes) uint8 for each of ``parts``.

        Raises BadInput, NotExpressible for values that the storage cannot hold.
        """
        wide = cast(rows, "F32")
        if self.scaled:
            return [_raw(self.scaled.encode(wide))]
        if self.form is None:
            return [_raw(cast(wide, self.parts[0].dtype))]
        made = [self.form.codes(wide), self.form.scales(wide, self.parts[1].dtype)]
        if not self.form.symmetric:
            made.append(self.form.zero_points(wide))
        return [_raw(one) for one in made]

    def stored(self, row: int) -> Array:
        """The bytes of one token, (1, bytes) uint8, ``parts`` side by side."""
        return self.file.token_bytes(self.name, row, row + 1)

    def values(self, row: int) -> Array:
        """The numbers of one token, (hidden,) float32."""
        raw = self.stored(row)[0]
        if self.scaled:
            return self.scaled.decode(raw.view(DTYPES[self.parts[0].dtype]))
        if self.form is None:
            return cast(raw.view(DTYPES[self.parts[0].dtype]), "F32")
        ends = np.cumsum([part.nbytes // self.n_tokens for part in self.parts])
        codes, scales, *zeros = np.split(raw, ends[:-1])
        wide = cast(np.ascontiguousarray(scales).view(DTYPES[self.parts[1].dtype]), "F32")
        middle = self._numbers(zeros[0])[: len(wide)] if zeros else np.float32(1 << (self.form.bits - 1))
        numbers: Array = self._numbers(codes).reshape(len(wide), -1)
        values: Array = (numbers - np.reshape(middle, (-1, 1))) * wide[:, None]
        return values.reshape(-1)

    def _numbers(self, packed: Array) -> Array:
        assert self.form is not None
        if self.form.bits == 8:
            return packed.astype(np.float32)
        pairs: Array = np.stack([packed & 15, packed >> 4], axis=-1)
        return pairs.reshape(-1).astype(np.float32)

    @cached_property
    def _n_blocks(self) -> int:
        assert self.form is not None
        return self.hidden // self.form.size

    def _check(self) -> None:
        where, whole = f"{self.file.path}: {self.name}", self.parts[0]
        if self.form is None:
            if (whole.dtype not in FLOATS and not self.scaled) or len(whole.shape) != 2:
                found = f"{whole.dtype} {list(whole.shape)}"
                raise NotExpressible(where, f"rows of a matrix of {found} are not understood", instead=_INSTEAD)
            return
        per_token = [self.hidden * self.form.bits // 8, self._n_blocks * DTYPES[self.parts[1].dtype].itemsize]
        per_token.append(-(-self._n_blocks * self.form.bits // 8))
        for part, nbytes in zip(self.parts, per_token, strict=False):
            if part.nbytes != nbytes * self.n_tokens:
                reason = f"{part.name}: expected {nbytes} bytes a token for blocks of {self.form.size}, found "
                raise NotExpressible(where, f"{reason}{part.nbytes} for {self.n_tokens}", instead=_INSTEAD)


_INSTEAD = "ttexport merge ADAPTER --to onnx writes the folder anew"


def _form(file: OnnxFile, name: str) -> Blocks | None:
    form = file.blocks.get(name)
    if form is None:
        return None
    codes, scales, *zeros = file.stored_tensors(name)
    whole = form.bits in (4, 8) and form.size > 0 and not codes.nbytes * 8 // form.bits % form.size
    if not whole or codes.dtype != "U8" or scales.dtype not in FLOATS or any(one.dtype != "U8" for one in zeros):
        kinds = ", ".join(one.dtype for one in (codes, scales, *zeros))
        reason = f"blocks of {form.size} integers of {form.bits} bits in {kinds} are not understood"
        raise NotExpressible(f"{file.path}: {name}", reason, instead=_INSTEAD)
    return Blocks(form.bits, symmetric=not zeros, size=form.size)


def _raw(value: Array) -> Array:
    return np.ascontiguousarray(value).reshape(len(value), -1).view(np.uint8)
