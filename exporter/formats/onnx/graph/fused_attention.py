"""Build attention with GroupQueryAttention, a fused operator of ONNX Runtime that includes the rotary embedding.

Source: the documentation of GroupQueryAttention in ONNX Runtime's operator list.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.families.spec import Role
from exporter.formats.onnx.graph.attention import Attention
from exporter.formats.onnx.graph.linear import ORT
from exporter.formats.onnx.weights.packing import reads_packed, rotates_inside
from exporter.formats.onnx.weights.rope import MAIN


class FusedAttention(Attention):
    """Builds attention with ONNX Runtime's operator GroupQueryAttention instead of standard operators.

    GroupQueryAttention does not support left padding, and defines sliding windows differently from transformers.
    Therefore, the graph gives GroupQueryAttention the same length for all sequences of a batch, and masks keys with an
    attention bias.
    """

    def _attend(self, layer: int, at: str, x: ir.Value, outputs: Sequence[str]) -> Sequence[ir.Value]:
        attention, make = self.attention, self.make
        rotary: list[ir.Value | None] = [None, None, None]
        if inside := rotates_inside(self.spec, layer):
            rotary = [*(make.weight(f"{MAIN}.{part}_cache") for part in ("cos", "sin")), self.inputs.position_ids]
        bias = self._window_bias if layer in attention.windowed else self._bias
        last, total = self._lengths
        capped: dict[str, Any] = {"softcap": attention.softcap} if attention.softcap else {}
        return make.ops(
            "GroupQueryAttention",
            [*self._qkv(layer, at, x), *self.inputs.past[layer], last, total, *rotary, bias],
            at,
            outputs,
            domain=ORT,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            scale=attention.scale,
            do_rotary=int(inside),
            **capped,
        )

    def _qkv(self, layer: int, at: str, x: ir.Value) -> Sequence[ir.Value | None]:
        """Return the three inputs query, key and value of GroupQueryAttention.

        If the query input contains packed Q, K and V, the inputs key and value are None.
        """
        if reads_packed(self.spec, layer) and self.modules.has(Role.QKV, layer):
            return [self.modules.linear(Role.QKV, layer, x), None, None]
        projected = self._projected(layer, x)
        return projected if rotates_inside(self.spec, layer) else self._rotated(layer, at, *projected)

    @cached_property
    def _lengths(self) -> tuple[ir.Value, ir.Value]:
        """Return (index of the last key of each sequence as int32 [B], number of keys as an int32 scalar)."""
        make, at, int32 = self.make, "lengths", int(ir.DataType.INT32)
        total = make.op("Shape", [self.inputs.attention_mask], f"{at}.total", start=1, end=2)
        batch = make.op("Shape", [self.inputs.input_ids], f"{at}.batch", start=0, end=1)
        last = make.op("Expand", [make.op("Sub", [total, make.constant(1)], f"{at}.last"), batch], f"{at}.last.each")
        last = make.op("Cast", [last], f"{at}.last.int32", to=int32)
        scalar = make.op("Squeeze", [total], f"{at}.total.scalar")
        return last, make.op("Cast", [scalar], f"{at}.total.int32", to=int32)

    @cached_property
    def _bias(self) -> ir.Value:
        return self._hidden(self._mask, "bias")

    @cached_property
    def _window_bias(self) -> ir.Value:
        return self._hidden(self._window_mask, "window_bias")

    def _hidden(self, mask: ir.Value, name: str) -> ir.Value:
        """Return an attention bias [B, 1, S, T] that is 0 for visible keys and half the lowest float for masked keys.

        The bias is half the lowest float, so that the sum of the bias and an attention score stays finite.
        """
        least = float(np.finfo(self.make.floats.numpy()).min) / 2
        return self.make.op("Where", [mask, self.make.number(0.0), self.make.number(least)], name)
