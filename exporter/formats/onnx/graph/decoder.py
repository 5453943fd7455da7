"""The graph of a decoder, from its description: standard operators of opset 23, ONNX Runtime's own where asked for.

Shapes in comments: B batch, S tokens of this call, T tokens with the cache, H hidden, V vocabulary.
Sources: the ONNX operator pages of opset 23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import onnx_ir as ir

from exporter.families.spec import DecoderSpec, Role
from exporter.formats.onnx.graph.attention import Attention
from exporter.formats.onnx.graph.builder import Builder
from exporter.formats.onnx.graph.fuse import fuse_residual_norms
from exporter.formats.onnx.graph.fused import FusedAttention
from exporter.formats.onnx.graph.linear import ORT, head, look_up
from exporter.formats.onnx.graph.moe import experts
from exporter.formats.onnx.graph.parts import BATCH, SEQUENCE, TOTAL, Parts, cache_shape, path, typed

OPSET: Final = 23
_OPSETS: Final = {"": OPSET, ORT: 1}
IR_VERSION: Final = 11


def build(spec: DecoderSpec, weights: Mapping[str, ir.Value], *, tied: bool, floats: ir.DataType, ops: str) -> ir.Graph:
    """The graph. ``weights``: every initialiser by ``path``, and the rotary caches.

    floats: of activations and cache. ops: "standard", or "ort" for what only ONNX Runtime has.
    """
    return _Decoder(spec, Builder(weights, floats), tied=tied, fused=ops == "ort").graph()


class _Decoder:
    def __init__(self, spec: DecoderSpec, make: Builder, *, tied: bool, fused: bool) -> None:
        self.spec, self.make, self.fused = spec, make, fused
        self.head = path(Role.EMBED if tied else Role.HEAD, None)
        self.parts = Parts(spec, self.make)
        self.attention = FusedAttention(self.parts) if fused else Attention(self.parts)

    def graph(self) -> ir.Graph:
        spec, make = self.spec, self.make
        x = self._embedded()
        presents: list[ir.Value] = []
        for layer in range(spec.layers):
            x, present = self._layer(layer, x)
            presents += present
        logits = self._logits(self.parts.norm(Role.FINAL_NORM, None, x))
        outputs = [typed(logits, ir.DataType.FLOAT, BATCH, SEQUENCE, spec.vocab)]
        outputs += [typed(value, make.floats, *cache_shape(spec, TOTAL)) for value in presents]
        nodes = fuse_residual_norms(make.nodes) if self.fused else make.nodes
        return ir.Graph(
            self.parts.given.values,
            outputs,
            nodes=nodes,
            initializers=make.initialisers,
            opset_imports={domain: _OPSETS[domain] for domain in sorted({node.domain for node in nodes})},
            name="decoder",
        )

    def _embedded(self) -> ir.Value:
        make, given, name = self.make, self.parts.given, path(Role.EMBED, None)
        x = look_up(make, name, given.input_ids)  # [B, S, H]
        x = self.parts.scaled(x, self.spec.embed_scale, f"{name}.scaled")
        if self.parts.has(Role.POSITIONS, None):
            name = path(Role.POSITIONS, None)
            positions = make.op("Gather", [make.weight(f"{name}.weight"), given.position_ids], name)
            x = make.op("Add", [x, positions], f"{name}.added")
        return x

    def _layer(self, layer: int, x: ir.Value) -> tuple[ir.Value, Sequence[ir.Value]]:
        at = f"layers.{layer}"
        normed = self._maybe_norm(Role.ATTN_NORM, layer, x)
        mixed, present = self.attention(layer, normed)
        mixed = self._maybe_norm(Role.ATTN_POST_NORM, layer, mixed)
        if self.spec.parallel:
            inner = self._mlp(layer, self._maybe_norm(Role.MLP_NORM, layer, x, otherwise=normed))
            both = self.make.op("Add", [mixed, inner], f"{at}.both")
            return self._added(x, both, f"{at}.residual"), present
        x = self._added(x, mixed, f"{at}.self_attn.residual")
        inner = self._mlp(layer, self._maybe_norm(Role.MLP_NORM, layer, x))
        inner = self._maybe_norm(Role.MLP_POST_NORM, layer, inner)
        return self._added(x, inner, f"{at}.mlp.residual"), present

    def _maybe_norm(self, role: Role, layer: int, x: ir.Value, otherwise: ir.Value | None = None) -> ir.Value:
        """X normalised if the decoder has that norm, else ``otherwise``, by default x."""
        if self.parts.has(role, layer):
            return self.parts.norm(role, layer, x)
        return x if otherwise is None else otherwise

    def _added(self, x: ir.Value, block: ir.Value, name: str) -> ir.Value:
        block = self.parts.scaled(block, self.spec.residual_scale, f"{name}.scaled")
        return self.make.op("Add", [x, block], name)

    def _mlp(self, layer: int, x: ir.Value) -> ir.Value:
        parts, make, at = self.parts, self.make, f"layers.{layer}.mlp"
        if self.spec.moe is not None:
            return experts(parts, layer, x)
        if not self.spec.mlp.gated:
            return parts.linear(Role.DOWN, layer, parts.active(parts.linear(Role.UP, layer, x), at))
        if parts.has(Role.GATE_UP, layer):
            sizes = dict.fromkeys((path(Role.GATE, layer), path(Role.UP, layer)), self.spec.mlp.inner)
            gate, up = parts.split(parts.linear(Role.GATE_UP, layer, x), sizes)
        else:
            gate, up = parts.linear(Role.GATE, layer, x), parts.linear(Role.UP, layer, x)
        gated = make.op("Mul", [parts.active(gate, at), up], f"{at}.gated")
        return parts.linear(Role.DOWN, layer, gated)

    def _logits(self, x: ir.Value) -> ir.Value:
        """Always float32: that is what clients sample from, whatever the precision of the model."""
        make, at = self.make, path(Role.HEAD, None)
        x = head(make, x, self.head, at, fused=self.fused)
        x = self.parts.scaled(x, self.spec.logit_scale, f"{at}.scaled")
        x = self.parts.capped(x, self.spec.logit_softcap, f"{at}.capped")
        x = make.cast(x, make.floats, ir.DataType.FLOAT, f"{at}.float32")
        x.name = "logits"
        return x
