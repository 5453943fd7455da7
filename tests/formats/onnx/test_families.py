"""Every family's graph computes transformers' logits, for all patterns of inputs that clients use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.formats.onnx.weights.precision import PRECISIONS
from exporter.sources.onnx.file import OnnxFile
from exporter.verify.running.metrics import compare, pool
from exporter.verify.runtimes.onnx_runtime import Session
from fixtures.models import families
from tests.formats.onnx import reference
from tests.formats.onnx.conftest import Write, random_ids
from tests.formats.onnx.test_logits import SMOLLM2_MAX_ABS, assert_same, worst
from tests.formats.onnx.weights.test_precision import full

#: Longer than every window, shorter than the unscaled context: beyond it even transformers computes other logits token
#: by token than in one pass.
SEQUENCES = [random_ids(60, families.VOCAB, 0), random_ids(13, families.VOCAB, 1), random_ids(1, families.VOCAB, 2)]


@pytest.fixture(scope="session", params=list(families.FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("families") / request.param
    return families.build(request.param, path, dtype="float32")


@pytest.mark.parametrize("ops", ["standard", "ort"])
def test_every_pattern_of_inputs_gives_the_logits_of_transformers(write: Write, base: Path, ops: str) -> None:
    want = reference.logits(reference.load(base), SEQUENCES)
    assert_same(write(base, ops=ops), want, SEQUENCES, SMOLLM2_MAX_ABS)


#: Mean KL from fp32. Measured over all families: up to 1.3e-5, 4.8e-3, 0.14 and 0.044.
VARIANT_KL = {"fp16": 5e-5, "int8": 1e-2, "q4f16": 0.25, "q4-sym": 0.1}


@pytest.mark.parametrize("ops", ["standard", "ort"])
def test_every_variant_stays_near_fp32(write: Write, base: Path, ops: str) -> None:
    folder = write(base, ops=ops, quants=("fp32", *VARIANT_KL)) / "onnx"
    want = full(folder / "model.onnx", SEQUENCES)
    for name, limit in VARIANT_KL.items():
        got = full(folder / f"{PRECISIONS[name].stems[0]}.onnx", SEQUENCES)
        kl = pool([compare(*pair) for pair in zip(want, got, strict=True)]).kl
        assert kl <= limit, name


@pytest.mark.parametrize(("variant", "bits"), [("int8", 8), ("q4", 4), ("q4-sym", 4)])
def test_experts_take_as_few_bits_as_other_matrices(
    write: Write, tmp_path_factory: pytest.TempPathFactory, variant: str, bits: int
) -> None:
    """In q4 the inner layers have 4 bits, except the down projections, which are more sensitive."""
    base = families.build("mixtral", tmp_path_factory.mktemp("experts") / "base", dtype="float32", num_hidden_layers=8)
    stored = OnnxFile.open(write(base, quants=(variant,))).initialisers
    for module, width, expected_bits in (("gate_proj", 64, bits), ("up_proj", 64, bits), ("down_proj", 96, 8)):
        (codes,) = (tensor for name, tensor in stored.items() if name.endswith(f"3.mlp.experts.{module}.weight"))
        assert (codes.dtype, codes.shape[1]) == ("U8", width * expected_bits // 8)
        zeros = codes.name.replace(".weight", ".zero_points")
        assert (zeros in stored) == (variant == "q4" and expected_bits == 4)


def test_the_graph_passes_the_full_check_and_strict_inference(write: Write, base: Path) -> None:
    path = write(base) / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    names = [node.name for node in model.graph.node]
    assert len(names) == len(set(names))


def test_a_text_beyond_the_original_context_takes_the_long_factors(
    write: Write, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = families.build("phi4_mini", tmp_path_factory.mktemp("long") / "base", dtype="float32")
    ids = random_ids(300, families.VOCAB)
    folder = write(base)
    session = Session(folder / "onnx" / "model.onnx")
    for count in (128, 129, 300):  # the original context has 128 positions
        feeds = np.array([ids[:count]], np.int64)
        got, _ = session.run(feeds, np.ones_like(feeds), np.arange(count)[None], session.empty_cache(1))
        (want,) = reference.logits(reference.load(base), [ids[:count]])
        assert worst([got[0]], [want]) <= SMOLLM2_MAX_ABS
