"""The reference supports every type of adapter, rounds as its artifact is stored, and restores the model afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exporter.cli.main import run
from exporter.verify.runtimes.rounding import rounded
from exporter.verify.tolerances import HF_ROUNDING_SHARE
from fixtures.models.tie_layouts import FAMILIES
from tests.merge.tuned import Bench, attached, difference, logits, merge, reloaded

#: family, layout, type of adapter, dtype of the base, whether the head must be untied
FULL = [
    ("t5", "tied", "lora and rows", "float32", False),
    ("llama", "tied", "rows and a saved head", "bfloat16", True),
    ("gpt2", "tied", "bias all", "bfloat16", False),
]
ROUNDED = [
    "lora",
    "dora",
    "bias all",
    "parameter",
    "lora embedding, tied",
    "dora embedding, tied",
    "lora and rows",
    "rows and lora of the head",
    "saved both",
    "saved norm",
]


@pytest.mark.parametrize(("family", "layout", "adapter_type", "dtype", "untie"), FULL)
def test_a_merge_is_proven_in_transformers(
    family: str, layout: str, adapter_type: str, dtype: str, untie: bool, bench: Bench, tmp_path: Path
) -> None:
    base, adapter = bench.base(family, layout, dtype), bench.adapter(family, layout, adapter_type)
    out = merge(base, [adapter], tmp_path / "out", untie=untie)
    argv = ["verify", str(out), "--reference", str(base), "--adapter", str(adapter), "-q"]
    assert run([*argv, *(["--untie"] if untie else [])]) == 0


@pytest.mark.parametrize(
    ("family", "adapter_type"),
    [
        (family, adapter_type)
        for family in FAMILIES
        for adapter_type in ROUNDED
        # T5's encoder and decoder have separate embeddings: adapters of one of them are not merged.
        if not (family == "t5" and any(use in adapter_type for use in ("embedding", "head", "both")))
    ],
)
def test_the_rounded_reference_is_what_a_16_bit_checkpoint_computes(
    family: str, adapter_type: str, bench: Bench, tmp_path: Path
) -> None:
    layout = "untied" if family == "gemma3" else "tied"
    half, adapter = bench.base(family, layout, "bfloat16"), bench.adapter(family, layout, adapter_type)
    out = merge(half, [adapter], tmp_path / "out", untie=layout == "tied")
    tuned = attached(reloaded(half, family), [adapter])
    as_trained = logits(tuned)
    with rounded(tuned, torch.bfloat16, vectors=True):
        want = logits(tuned)
    assert torch.equal(logits(tuned), as_trained), "the model is restored"
    assert (effect := difference(want, as_trained)) > 1e-4
    assert difference(logits(reloaded(out, family)), want) <= HF_ROUNDING_SHARE * effect


def test_an_adapter_that_peft_cannot_load_is_an_error_with_its_reason(bench: Bench) -> None:
    adapter = bench.adapter("llama", "tied", "lora")
    with pytest.raises(ValueError, match=r"lora: unmodified PEFT cannot load the adapter: .*q_proj"):
        attached(bench.model("gpt2", "tied"), [adapter])
