"""Every adapter type that PEFT merges, module by module: the merged checkpoint against the unmerged adapter in PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.export.run import plan_export, run_export
from exporter.export.spec import ExportSpec, MergeOptions
from exporter.progress import Hooks
from exporter.sources.peft.types.table import MERGED
from exporter.verify.options import VerifyOptions
from exporter.verify.report import Report
from fixtures.models.tie_layouts import FAMILIES
from fixtures.peft_adapters import build_adapter
from fixtures.peft_types import BY_PEFT, ON_CONV1D
from tests.merge.tuned import Bench, attached, difference, logits, reloaded, stored

#: The largest difference of logits, as a share of the largest logit.
SHARE = 1e-5
CELLS = [
    *(("llama", layout, name) for layout in ("tied", "untied") for name in BY_PEFT),
    *(("gpt2", "tied", name) for name in ON_CONV1D),
]


def export(base: Path, adapter: Path, out: Path, *, level: str, untie: bool = False) -> Report:
    merge = MergeOptions(via="peft", untie=untie)
    spec = ExportSpec(adapters=(adapter,), base=str(base), out=out, merge=merge, verify=VerifyOptions(level=level))
    (report,) = run_export(plan_export(spec), Hooks())
    return report


def require_equal(merged: torch.Tensor, unmerged: torch.Tensor, base: torch.Tensor) -> None:
    limit = SHARE * unmerged.abs().max().item()
    assert difference(merged, unmerged) <= limit
    assert difference(base, unmerged) > 100 * limit, "the adapter changes the model"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, once, when SHiRA runs
@pytest.mark.parametrize(("family", "layout", "name"), CELLS)
def test_the_merged_model_computes_what_unmerged_peft_computes(
    family: str, layout: str, name: str, bench: Bench, tmp_path: Path
) -> None:
    base, model = bench.base(family, layout), bench.model(family, layout)
    adapter = build_adapter(model, tmp_path / "adapter", family, BY_PEFT[name])
    untie = layout == "tied" and "embedding" in name
    report = export(base, adapter, tmp_path / "out", level="weights", untie=untie)
    assert not report.skipped
    assert any(check.name == "updates" for check in report.checks)
    unmerged = logits(attached(bench.model(family, layout), [adapter]))
    require_equal(logits(reloaded(tmp_path / "out", family)), unmerged, logits(model))


def test_every_type_that_peft_merges_is_tested() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of projections that are not saved
        configs: list[Any] = [recipe.config(FAMILIES["llama"]) for recipe in BY_PEFT.values()]
    assert {config.peft_type.value for config in configs} == {*MERGED, "LORA"}


def test_tensors_of_other_modules_keep_their_bytes(bench: Bench, tmp_path: Path) -> None:
    base = bench.base("llama", "tied")
    adapter = build_adapter(bench.model("llama", "tied"), tmp_path / "adapter", "llama", BY_PEFT["oft"])
    export(base, adapter, tmp_path / "out", level="full")
    before, after = stored(base), stored(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.split(".")[-2] in FAMILIES["llama"].linear}
