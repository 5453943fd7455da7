"""Build the ONNX graph of a decoder from standard operators of opset 23 or from ONNX Runtime's own operators.

Dimensions in comments: B is the batch size, S the number of tokens in the current call, T the number of tokens
including the KV cache, H the hidden size, V the vocabulary size.
Source: the ONNX operator documentation of opset 23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import onnx_ir as ir

from exporter.families.spec import DecoderSpec, Role
from exporter.formats.onnx.graph.attention import Attention
from exporter.formats.onnx.graph.builder import Builder
from exporter.formats.onnx.graph.fused_attention import FusedAttention
from exporter.formats.onnx.graph.fused_norms import fuse_residual_norms
from exporter.formats.onnx.graph.inputs import BATCH, SEQUENCE, TOTAL, cache_shape, typed
from exporter.formats.onnx.graph.linear import ORT, head, look_up
from exporter.formats.onnx.graph.modules import Modules, path
from exporter.formats.onnx.graph.moe import experts

OPSET: Final = 23
_OPSETS: Final = {"": OPSET, ORT: 1}
IR_VERSION: Final = 11


def build(spec: DecoderSpec, weights: Mapping[str, ir.Value], *, tied: bool, floats: ir.DataType, ops: str) -> ir.Graph:
    """Build the ONNX graph of a decoder.

    weights: maps the names of all initialisers to graph values. floats: dtype of the activations and the KV cache. ops:
    "standard", or "ort" to use operators that exist only in ONNX Runtime.
    """
    return _Decoder(spec, Builder(weights, floats), tied=tied, fused=ops == "ort").graph()


class _Decoder:
    def __init__(self, spec: DecoderSpec, make: Builder, *, tied: bool, fused: bool) -> None:
        self.spec, self.make, self.fused = spec, make, fused
        self.head = path(Role.EMBED if tied else Role.HEAD, None)
        self.modules = Modules(spec, self.make)
        self.attention = FusedAttention(self.modules) if fused else Attention(self.modules)

    def graph(self) -> ir.Graph:
        spec, make = self.spec, self.make
        x = self._embedded()
        presents: list[ir.Value] = []
        for layer in range(spec.layers):
            x, present = self._layer(layer, x)
            presents += present
        logits = self._logits(self.modules.norm(Role.FINAL_NORM, None, x))
        outputs = [typed(logits, ir.DataType.FLOAT, BATCH, SEQUENCE, spec.vocab)]
        outputs += [typed(value, make.floats, *cache_shape(spec, TOTAL)) for value in presents]
        nodes = fuse_residual_norms(make.nodes) if self.fused else make.nodes
        return ir.Graph(
            self.modules.inputs.values,
            outputs,
            nodes=nodes,
            initializers=make.initialisers,
            opset_imports={domain: _OPSETS[domain] for domain in sorted({node.domain for node in nodes})},
            name="decoder",
        )

    def _embedded(self) -> ir.Value:
        make, inputs, name = self.make, self.modules.inputs, path(Role.EMBED, None)
        x = look_up(make, name, inputs.input_ids)  # [B, S, H]
        x = self.modules.scaled(x, self.spec.embed_scale, f"{name}.scaled")
        if self.modules.has(Role.POSITIONS, None):
            name = path(Role.POSITIONS, None)
            positions = make.op("Gather", [make.weight(f"{name}.weight"), inputs.position_ids], name)
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
        """Apply the norm that has the role ``role`` in ``layer`` to ``x``.

        If the decoder has no norm with the role, ``otherwise`` is returned, or ``x`` if ``otherwise`` is None.
        """
        bare = self.spec.norm.bare and role in (Role.ATTN_NORM, Role.MLP_NORM)
        if bare or self.modules.has(role, layer):
            return self.modules.norm(role, layer, x)
        return x if otherwise is None else otherwise

    def _added(self, x: ir.Value, block: ir.Value, name: str) -> ir.Value:
        block = self.modules.scaled(block, self.spec.residual_scale, f"{name}.scaled")
        return self.make.op("Add", [x, block], name)

    def _mlp(self, layer: int, x: ir.Value) -> ir.Value:
        modules, make, at = self.modules, self.make, f"layers.{layer}.mlp"
        if self.spec.moe is not None:
            return experts(modules, layer, x)
        if not self.spec.mlp.gated:
            return modules.linear(Role.DOWN, layer, modules.active(modules.linear(Role.UP, layer, x), at))
        if modules.has(Role.GATE_UP, layer):
            sizes = dict.fromkeys((path(Role.GATE, layer), path(Role.UP, layer)), self.spec.mlp.inner)
            gate, up = modules.split(modules.linear(Role.GATE_UP, layer, x), sizes)
        else:
            gate, up = modules.linear(Role.GATE, layer, x), modules.linear(Role.UP, layer, x)
        gated = make.op("Mul", [modules.active(gate, at), up], f"{at}.gated")
        return modules.linear(Role.DOWN, layer, gated)

    def _logits(self, x: ir.Value) -> ir.Value:
        """Return the logits in float32, which clients expect for sampling even if the model is in float16."""
        make, at = self.make, path(Role.HEAD, None)
        x = head(make, x, self.head, at, fused=self.fused)
        x = self.modules.scaled(x, self.spec.logit_scale, f"{at}.scaled")
        x = self.modules.capped(x, self.spec.logit_softcap, f"{at}.capped")
        x = make.cast(x, make.floats, ir.DataType.FLOAT, f"{at}.float32")
        x.name = "logits"
        return x
