"""A change below quantisation noise fails: the stored row would be no nearer to the trained row than the base's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.cli.main import run
from exporter.verify.findings import RowErrors
from exporter.verify.tolerances import ROW_ERROR_SHARE
from exporter.verify.values.row_errors import check_row_errors
from fixtures import adapters
from tests.support.documents import read_report
from tests.support.trained import TRAINED_IDS


@pytest.mark.parametrize(("share", "passes"), [(0.9, True), (1.1, False), (np.nan, False)])
def test_the_check_fails_if_the_error_exceeds_the_change(share: float, passes: bool) -> None:
    errors = RowErrors("embedding", "Q8_0", [3, 4], [0.01, share * ROW_ERROR_SHARE * 2.0], [1.0, 2.0])
    (check,) = check_row_errors([errors])
    assert check.passed is passes
    assert "token 4" in check.detail


def test_a_row_that_training_did_not_change_passes() -> None:
    (check,) = check_row_errors([RowErrors("embedding", "Q8_0", [3], [0.01], [0.0])])
    assert check.passed


def test_rows_that_are_not_quantised_are_compared_bit_for_bit_instead() -> None:
    assert list(check_row_errors([RowErrors("embedding", "BF16", [3], [9.0], [1.0])])) == []


@pytest.mark.parametrize(("scale", "code"), [(0.5, 0), (0.004, 3)])
def test_a_change_below_the_steps_of_q8_0_is_exit_3_and_one_above_is_not(
    scale: float, code: int, tiny_tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of Q8_0 is 1/127 of a block's largest value: about 0.02 of a deviation, its error a third of that."""
    adapter = adapters.stock_rows(tiny_tied, tmp_path / "adapter", TRAINED_IDS, scale=scale)
    out = tmp_path / "model.gguf"
    argv = ["merge", str(adapter), "--base", str(tiny_tied), "--to", "gguf", "-q", "-o", str(out)]
    assert run([*argv, "--report", str(tmp_path / "bf16")]) == 0, "bfloat16 holds either change"
    assert run([*argv, "--quant", "Q8_0", "--report", str(tmp_path / "q8_0"), "--force"]) == code
    (artifact,) = read_report(tmp_path / "q8_0")["artifacts"]
    failed = [check["name"] for check in artifact["checks"] if not check["passed"]]
    assert failed == (["embedding changes"] if code else [])
    assert ("embedding changes" in capsys.readouterr().err) is bool(code)
