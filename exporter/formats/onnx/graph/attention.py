"""Build self-attention with a KV cache: projections, query and key norms, rotary embedding, and masks.

Sources: the ONNX operator documentation of Attention-23 and RotaryEmbedding-23.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import onnx_ir as ir

from exporter.families.spec import Role
from exporter.formats.onnx.graph.modules import Modules, path
from exporter.formats.onnx.weights.rope import LOCAL, LONG, MAIN


class Attention:
    """Builds the attention nodes of every layer.

    Masks and other values shared by several layers are built once per graph.
    """

    def __init__(self, modules: Modules) -> None:
        """``modules``: builder of the projections and norms in the ONNX graph."""
        self.modules, self.make, self.inputs = modules, modules.make, modules.inputs
        self.spec, self.attention = modules.spec, modules.spec.attention

    def __call__(self, layer: int, x: ir.Value) -> tuple[ir.Value, Sequence[ir.Value]]:
        """Add the nodes that compute the attention of ``layer`` for the normalised input ``x``.

        Returns (attention output, new KV cache of the layer).
        """
        at = f"layers.{layer}.self_attn"
        mixed, *present = self._attend(layer, at, x, (at, f"present.{layer}.key", f"present.{layer}.value"))
        return self.modules.linear(Role.ATTN_OUT, layer, mixed), present

    def _attend(self, layer: int, at: str, x: ir.Value, outputs: Sequence[str]) -> Sequence[ir.Value]:
        """Add the nodes that compute the attention, without the output projection.

        Returns (result of the attention, new keys, new values). outputs: the names of the three returned graph values.
        """
        attention = self.attention
        q, k, v = self._rotated(layer, at, *self._projected(layer, x))
        mask = self._window_mask if layer in attention.windowed else self._mask
        capped: dict[str, Any] = {"softcap": attention.softcap} if attention.softcap else {}
        return self.make.ops(
            "Attention",
            [q, k, v, mask, *self.inputs.past[layer]],
            at,
            outputs,
            q_num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            scale=attention.scale,
            **capped,
        )

    def _projected(self, layer: int, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return queries, keys and values [B, S, heads * width] before the rotary embedding."""
        attention, linear = self.attention, self.modules.linear
        if self.modules.has(Role.QKV, layer):
            q_size, kv_size = (count * attention.head_dim for count in (attention.heads, attention.kv_heads))
            sizes = {path(role, layer): size for role, size in ((Role.Q, q_size), (Role.K, kv_size), (Role.V, kv_size))}
            q, k, v = self.modules.split(linear(Role.QKV, layer, x), sizes)
        else:
            q, k, v = (linear(role, layer, x) for role in (Role.Q, Role.K, Role.V))
        q, k, v = (self._clipped(x) for x in (q, k, v))
        if not attention.norm_after_rope:
            q, k = self._normed(Role.Q_NORM, layer, q), self._normed(Role.K_NORM, layer, k)
        return self._grown(q, layer), k, v

    def _rotated(
        self, layer: int, at: str, q: ir.Value, k: ir.Value, v: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        q = self._rotate(q, layer, self.attention.heads, f"{at}.q_rotated")
        k = self._rotate(k, layer, self.attention.kv_heads, f"{at}.k_rotated")
        if self.attention.norm_after_rope:
            q, k = self._normed(Role.Q_NORM, layer, q), self._normed(Role.K_NORM, layer, k)
        return q, k, v

    def _normed(self, role: Role, layer: int, x: ir.Value) -> ir.Value:
        """Normalise queries or keys [B, S, heads * width], over the whole last axis or for each head separately."""
        qk_norm, make, name = self.attention.qk_norm, self.make, path(role, layer)
        if qk_norm is None:
            return x
        if qk_norm == "all":
            return self.modules.norm(role, layer, x)
        width = self.attention.head_dim
        heads = self.attention.heads if role is Role.Q_NORM else self.attention.kv_heads
        x = make.op("Reshape", [x, make.constant(0, 0, heads, width)], f"{name}.by_head")
        if qk_norm == "head":
            x = self.modules.norm(role, layer, x)
        else:  # every head has separate weights, but the operator's scale is shared by all heads
            x = make.op(
                "LayerNormalization",
                [x, self.modules.ones(width)],
                f"{name}.unscaled",
                axis=-1,
                epsilon=self.spec.norm.eps,
            )
            x = make.op("Mul", [x, make.weight(f"{name}.weight")], name)
        return make.op("Reshape", [x, make.constant(0, 0, heads * width)], f"{name}.joined")

    def _clipped(self, x: ir.Value) -> ir.Value:
        limit = self.attention.clip
        if limit is None:
            return x
        return self.make.op("Clip", [x, self.make.number(-limit), self.make.number(limit)], f"{x.name}.clipped")

    def _grown(self, q: ir.Value, layer: int) -> ir.Value:
        """Multiply the queries ``q`` by a factor that grows with the position, if the decoder has such a factor."""
        if self.attention.log_growth is None:
            return q
        return self.make.op("Mul", [q, self._growth], f"layers.{layer}.self_attn.q_grown")

    @cached_property
    def _growth(self) -> ir.Value:
        """Return the factors [B, S, 1] that multiply the queries at the token positions in a call of the graph."""
        make, rope, at = self.make, self.spec.rope, "growth"
        assert rope is not None
        periods = make.constant(rope.original_positions or self.spec.max_positions, scalar=True)
        periods = make.op("Div", [self.inputs.position_ids, periods], f"{at}.periods")
        x = make.op("Cast", [periods], f"{at}.periods.float", to=int(make.floats))
        x = make.op("Log", [make.op("Add", [x, make.number(1.0)], f"{at}.shifted")], f"{at}.log")
        x = make.op("Mul", [x, make.number(self.attention.log_growth or 0.0)], f"{at}.scaled")
        return make.op(
            "Unsqueeze", [make.op("Add", [x, make.number(1.0)], f"{at}.factor"), make.constant(2)], f"{at}.column"
        )

    def _rotate(self, x: ir.Value, layer: int, heads: int, name: str) -> ir.Value:
        rope = self.spec.rope
        if rope is None or layer in rope.skipped:
            return x
        attributes: dict[str, Any] = {"num_heads": heads, "interleaved": int(rope.interleaved)}
        if rope.dims != self.attention.head_dim:
            attributes["rotary_embedding_dim"] = rope.dims
        if rope.scaling is not None and rope.scaling.get("rope_type") == "longrope":
            angles = [*self._long_angles]
        else:
            table = LOCAL if rope.local_theta is not None and layer in self.attention.windowed else MAIN
            caches = [self.make.weight(f"{table}.{part}_cache") for part in ("cos", "sin")]
            angles = [*caches, self.inputs.position_ids]
        return self.make.op("RotaryEmbedding", [x, *angles], name, **attributes)

    @cached_property
    def _long_angles(self) -> Sequence[ir.Value]:
        """Return the longrope cosines and sines [B, S, dims / 2] for the token positions in a call of the graph.

        If the tokens of a call extend beyond the original context length, longrope uses the long factors for all
        positions of the call, as in transformers. Keys in the KV cache keep the rotation of the call in which they were
        computed.
        """
        make, rope, positions = self.make, self.spec.rope, self.inputs.position_ids
        assert rope is not None
        last = make.op("ReduceMax", [positions], f"{LONG}.last_position", keepdims=0)
        limit = make.constant((rope.original_positions or self.spec.max_positions) - 1, scalar=True)
        beyond = make.op("Greater", [last, limit], f"{LONG}.beyond")
        angles = []
        for part in ("cos", "sin"):
            short, long = (
                make.op("Gather", [make.weight(f"{table}.{part}_cache"), positions], f"{table}.{part}")
                for table in (MAIN, LONG)
            )
            angles.append(make.op("Where", [beyond, long, short], f"{LONG}.{part}.chosen"))
        return angles

    @cached_property
    def _positions(self) -> tuple[ir.Value, ir.Value]:
        """Return (position indices of the keys [T], position indices of the queries [S, 1]).

        The position indices also count padding tokens.
        """
        make, at = self.make, "mask"
        zero, step = make.constant(0, scalar=True), make.constant(1, scalar=True)
        total = make.op("Shape", [self.inputs.attention_mask], f"{at}.total_length", start=1, end=2)
        total = make.op("Squeeze", [total], f"{at}.total_length.scalar")
        length = make.op("Shape", [self.inputs.input_ids], f"{at}.length", start=1, end=2)
        length = make.op("Squeeze", [length], f"{at}.length.scalar")
        past = make.op("Sub", [total, length], f"{at}.past_length")
        keys = make.op("Range", [zero, total, step], f"{at}.keys")
        queries = make.op("Range", [past, total, step], f"{at}.queries")
        return keys, make.op("Unsqueeze", [queries, make.constant(1)], f"{at}.queries.column")

    @cached_property
    def _mask(self) -> ir.Value:
        """Return a boolean mask [B, 1, S, T], which is true where a query attends to a key.

        The keys of padding tokens on the left and on the right are masked out.
        """
        make, at = self.make, "mask"
        keys, queries = self._positions
        causal = make.op("LessOrEqual", [keys, queries], f"{at}.causal")  # [S, T]
        text = make.op("Cast", [self.inputs.attention_mask], f"{at}.text", to=int(ir.DataType.BOOL))
        text = make.op("Unsqueeze", [text, make.constant(1, 2)], f"{at}.text.row")  # [B, 1, 1, T]
        seen = make.op("And", [causal, text], f"{at}.seen")
        # A left padding token would attend to no key, and a softmax over no keys is NaN; so padding attends to itself.
        itself = make.op("Equal", [keys, queries], f"{at}.itself")
        return make.op("Or", [seen, itself], at)

    @cached_property
    def _window_mask(self) -> ir.Value:
        """Return a boolean mask [B, 1, S, T] for sliding windows, which is true where a query attends to a key."""
        make, at = self.make, "window_mask"
        keys, queries = self._positions
        assert self.attention.window is not None
        first = make.op("Sub", [queries, make.constant(self.attention.window, scalar=True)], f"{at}.before")
        near = make.op("Greater", [keys, first], f"{at}.near")
        return make.op("And", [self._mask, near], at)
