"""Build a mixture of experts in an ONNX graph: a router, and a Loop that runs each expert on the tokens routed to it.

Each expert runs at most once per call of the graph, and only on the tokens routed to the expert. Before an expert runs,
the expert's matrices are copied out of the stacked weights. Copying the matrices of an expert is about as expensive as
multiplying one token by the matrices, because both read every byte. If the expert matrices are quantised, the copy
dequantises the matrices, and a token takes about as long as in float32 (8 experts of 512 x 1536, 4 layers, two cores:
21 ms per token in fp32, 19 ms in int8, 24 ms in q4).
Source: transformers' MixtralSparseMoeBlock and Qwen3MoeSparseMoeBlock.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from exporter.families.spec import Role
from exporter.formats.onnx.graph.builder import Builder
from exporter.formats.onnx.graph.inputs import typed
from exporter.formats.onnx.graph.linear import select_linear
from exporter.formats.onnx.graph.modules import Modules, path

#: The experts' outputs are summed in float32, because ONNX Runtime's ScatterND does not add narrower floats.
_SUM: Final = ir.DataType.FLOAT


def experts(modules: Modules, layer: int, x: ir.Value) -> ir.Value:
    """Add the mixture of experts of ``layer`` for the input ``x`` [B, S, H], and return the output."""
    make, moe, at = modules.make, modules.spec.moe, f"layers.{layer}.mlp"
    assert moe is not None
    shape = make.op("Shape", [x], f"{at}.shape")
    tokens = make.op("Reshape", [x, make.constant(-1, modules.spec.hidden)], f"{at}.tokens")  # [N, H]
    scores = modules.linear(Role.ROUTER, layer, tokens)  # [N, experts]
    shares = make.op("Softmax", [scores], f"{at}.router.probabilities", axis=-1)
    best, chosen = make.ops(
        "TopK", [shares, make.constant(moe.top_k)], f"{at}.router.top", (f"{at}.router.best", f"{at}.router.chosen")
    )
    if moe.normalised:
        total = make.op("ReduceSum", [best, make.constant(-1)], f"{at}.router.total")
        best = make.op("Div", [best, total], f"{at}.router.normalised")
    none = make.op("Mul", [shares, make.number(0.0)], f"{at}.router.none")
    weights = make.op("ScatterElements", [none, chosen, best], f"{at}.router.weights", axis=-1)
    by_expert = make.op("Transpose", [weights], f"{at}.router.by_expert", perm=[1, 0])  # [experts, N]
    nothing = make.op("Mul", [tokens, make.number(0.0)], f"{at}.nothing")
    nothing = make.cast(nothing, make.floats, _SUM, f"{at}.nothing.wide")
    body = _body(modules, layer, tokens, by_expert)
    count, always = make.constant(moe.experts, scalar=True), make.truth
    total = make.op("Loop", [count, always, nothing], f"{at}.experts", body=body)
    total = make.cast(total, _SUM, make.floats, f"{at}.experts.narrow")
    return make.op("Reshape", [total, shape], f"{at}.joined")


def _body(modules: Modules, layer: int, tokens: ir.Value, by_expert: ir.Value) -> ir.Graph:
    """Build the body of the Loop over experts.

    Each iteration of the Loop adds the output of one expert to the rows of the tokens that are routed to the expert.
    """
    at = f"layers.{layer}.mlp.expert"
    make = modules.make.inner()
    number = _scalar(f"{at}.number", ir.DataType.INT64)
    going = _scalar(f"{at}.going", ir.DataType.BOOL)
    subtotal = typed(ir.Value(name=f"{at}.so_far"), _SUM, None, modules.spec.hidden)
    mine = make.op("Gather", [by_expert, number], f"{at}.weights", axis=0)  # [N]
    rows = make.op("NonZero", [mine], f"{at}.rows")  # [1, n]
    rows = make.op("Squeeze", [rows, make.constant(0)], f"{at}.rows.flat")
    size = make.op("Size", [rows], f"{at}.count")
    used = make.op("Greater", [size, make.constant(0, scalar=True)], f"{at}.used")
    then = _expert(modules, make.inner(), layer, number, tokens, mine, rows, subtotal)
    skip = make.inner()
    same = skip.op("Identity", [subtotal], f"{at}.skipped")
    total = make.op("If", [used], f"{at}.total", then_branch=then, else_branch=_graph(skip, [], [same], f"{at}.skip"))
    again = make.op("Identity", [going], f"{at}.again")
    return _graph(make, [number, going, subtotal], [again, total], f"{at}.turn")


def _expert(
    modules: Modules,
    make: Builder,
    layer: int,
    number: ir.Value,
    tokens: ir.Value,
    weights: ir.Value,
    rows: ir.Value,
    subtotal: ir.Value,
) -> ir.Graph:
    at = f"layers.{layer}.mlp.expert"
    inner, moe = Modules(modules.spec, make), modules.spec.moe
    assert moe is not None

    def linear(role: Role, x: ir.Value) -> ir.Value:
        return select_linear(make, x, path(role, layer), number, moe.experts, f"{at}.{role.value.rpartition('.')[2]}")

    x = make.op("Gather", [tokens, rows], f"{at}.tokens", axis=0)  # [n, H]
    gate = inner.active(linear(Role.EXPERT_GATE, x), at)
    hidden = make.op("Mul", [gate, linear(Role.EXPERT_UP, x)], f"{at}.gated")
    output = linear(Role.EXPERT_DOWN, hidden)
    share = make.op("Gather", [weights, rows], f"{at}.shares", axis=0)
    share = make.op("Unsqueeze", [share, make.constant(1)], f"{at}.shares.column")
    output = make.cast(make.op("Mul", [output, share], f"{at}.weighted"), make.floats, _SUM, f"{at}.weighted.wide")
    places = make.op("Unsqueeze", [rows, make.constant(1)], f"{at}.places")
    total = make.op("ScatterND", [subtotal, places, output], f"{at}.added", reduction="add")
    return _graph(make, [], [total], f"{at}.run")


def _scalar(name: str, dtype: ir.DataType) -> ir.Value:
    return typed(ir.Value(name=name), dtype)


def _graph(make: Builder, inputs: list[ir.Value], outputs: list[ir.Value], name: str) -> ir.Graph:
    return ir.Graph(inputs, outputs, nodes=make.nodes, name=name)
