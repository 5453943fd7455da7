"""Rows of other quantisers: the errors of an importance matrix pass, larger ones do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile
from exporter.verify.tolerances import QUANTISED_ERROR, QUANTISED_ERROR_MEDIAN, QUANTISED_ERROR_PLAIN
from exporter.verify.values.quantised_rows import too_far
from fixtures import tiny
from fixtures.models import gguf_files
from tests.marks import needs_llama_cpp
from tests.verify.damage import corruptions

WIDTH = 256


@pytest.mark.parametrize(
    ("storage", "limit"),
    [("Q4_K", QUANTISED_ERROR), ("Q8_0", QUANTISED_ERROR_PLAIN), ("int4 x 32, scales F32", QUANTISED_ERROR_PLAIN)],
)
@pytest.mark.parametrize(("factor", "passes"), [(0.99, True), (1.01, False), (np.nan, False)])
def test_the_error_of_one_row_may_be_that_of_its_type(storage: str, limit: float, factor: float, passes: bool) -> None:
    rows = [(number, 1.0) for number in range(9)] + [(9, factor * limit)]
    assert (not list(too_far(rows, storage, "the base"))) is passes


@pytest.mark.parametrize(("factor", "passes"), [(0.99, True), (1.01, False)])
def test_the_error_of_half_of_the_rows_has_a_lower_limit(factor: float, passes: bool) -> None:
    rows = [(number, factor * QUANTISED_ERROR_MEDIAN) for number in range(9)]
    assert (not list(too_far(rows, "Q4_K", "the base"))) is passes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_llama(tmp_path_factory.mktemp("important") / "base", hidden=WIDTH)


@pytest.fixture(scope="module")
def important(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantised by llama.cpp with importances that are thousands of times apart."""
    folder = tmp_path_factory.mktemp("important")
    plain = export(base, folder / "bf16.gguf")
    rng = np.random.default_rng(0)
    tensors = {
        name: tensor for name, tensor in GgufFile.open(plain).tensors.items() if "blk" in name and len(tensor.shape) > 1
    }
    sums = {name: np.exp(rng.normal(0, 2, tensor.shape[-1])).astype(np.float32) for name, tensor in tensors.items()}
    gguf_files.write_imatrix(folder / "importance.gguf", sums, calls=1)
    return export(base, folder / "q4.gguf", "--quant", "Q4_K_M", "--imatrix", str(folder / "importance.gguf"))


def export(base: Path, out: Path, *arguments: str) -> Path:
    assert run(["export", str(base), "--to", "gguf", "--verify", "off", "-q", "-o", str(out), *arguments]) == 0
    return out


def weights(artifact: Path, base: Path) -> int:
    return run(["verify", str(artifact), "--reference", str(base), "--level", "weights", "-q"])


@needs_llama_cpp
def test_an_importance_matrix_is_no_fault(important: Path, base: Path) -> None:
    assert weights(important, base) == 0


@needs_llama_cpp
@pytest.mark.parametrize("fault", ["swapped rows", "another scale", "another layer"])
def test_a_fault_under_an_importance_matrix_is_caught(fault: str, important: Path, base: Path, tmp_path: Path) -> None:
    broken = corruptions.copy(important, tmp_path)
    file, name = GgufFile.open(broken), "blk.0.ffn_up.weight"
    tensor = file.tensors[name]
    assert tensor.type == "Q4_K"
    rows = np.array(file.rows(name, 0, tensor.n_rows))
    if fault == "swapped rows":
        rows[[4, 5]] = rows[[5, 4]]
    elif fault == "another scale":  # the scale of all scales, float16, comes first in a block
        rows[:, :2] = (rows[:, :2].copy().view(np.float16) * np.float16(1.2)).view(np.uint8)
    else:
        rows = np.array(file.rows("blk.1.ffn_up.weight", 0, tensor.n_rows))
    corruptions.poke(broken, tensor.offset_bytes, rows.tobytes())
    assert weights(broken, base) == 3
