"""Several adapters in one merge, against the same adapters on one model in stock PEFT, all active and unmerged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from exporter.errors import BadInput
from fixtures.models.tie_layouts import FAMILIES
from tests.merge.tuned import LOGITS_MAX_ABS, Bench, difference, logits, merge, reloaded, require_verified

#: Adapters merged together: they train different tensors, or all add to the same.
TOGETHER: Final = [
    ("rows", "lora"),
    ("lora", "rows"),
    ("lora", "rslora"),
    ("lora", "rows", "patterns", "other rows"),
    ("lora and rows", "one layer"),
    ("saved norm", "rows"),
]


@pytest.mark.parametrize("kinds", TOGETHER, ids=" + ".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_several_adapters_merge_into_what_they_compute_together(
    family: str, kinds: Sequence[str], bench: Bench, tmp_path: Path
) -> None:
    base, adapters = bench.base(family, "tied"), [bench.adapter(family, "tied", kind) for kind in kinds]
    out = merge(base, adapters, tmp_path / "out")
    together = logits(bench.tuned(family, "tied", adapters))
    assert difference(logits(reloaded(out, family)), together) <= LOGITS_MAX_ABS
    for kind in kinds:
        assert difference(together, bench.unmerged(family, "tied", kind)) > 0.01, "every adapter has an effect"
    require_verified(out, base, adapters)


@pytest.mark.parametrize("kinds", [("rows", "lora and rows"), ("rows", "rows once"), ("saved norm", "saved both")])
def test_adapters_that_set_the_same_values_are_refused(kinds: Sequence[str], bench: Bench, tmp_path: Path) -> None:
    adapters = [bench.adapter("llama", "untied", kind) for kind in kinds]
    adapters += adapters[-1:] if kinds[0] == "saved norm" else []
    with pytest.raises(BadInput, match=r"expected (only one adapter to set|.* to be set once)"):
        merge(bench.base("llama", "untied"), adapters, tmp_path / "out")
