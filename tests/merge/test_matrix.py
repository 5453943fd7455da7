"""Every kind of adapter on every way of tying in four families: the merged checkpoint against stock PEFT, unmerged.

The reference is the model as it was trained, adapters unmerged. PEFT's own merge is none: where embedding and head
share a tensor it applies some adapters twice and loses others, as a test here shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from exporter.errors import BadInput, NotExpressible, TTExportError
from fixtures.peft_adapters import KINDS
from fixtures.tie_layouts import FAMILIES
from tests.merge.tuned import (
    LOGITS_MAX_ABS,
    Bench,
    logits,
    merge,
    reloaded,
    require_untouched,
    require_verified,
)

Cell = tuple[str, str, str]

#: On a tied base these make head and embedding differ: one tensor cannot hold both.
PART_THE_TWO: Final = {
    "rows of the head",
    "lora embedding",
    "lora head",
    "lora both",
    "dora embedding",
    "dora embedding, tied",  # one side's norms run over rows, the other's over columns
    "dora head",
    "saved embedding",
    "saved head",
    "saved both",
    "lora and different rows",
    "lora and rows of the head",
    "rows and lora of the head",
    "rows and a saved head",
    "new tokens in saved modules",
}
#: PEFT knows embeddings to be tied by a few names, and "wte" is not among them.
UNKNOWN_TO_PEFT: Final = {"lora embedding, tied", "saved embedding, tied"}
#: PEFT 0.21 makes these on a tied base, but cannot run them: the head's rows are wrapped twice.
NEVER_RAN: Final = {"rows of both", "new rows of both", "new rows of both, embedding saved"}
#: T5's encoder and decoder have embedding modules of their own, which "shared" does not reach.
ONE_SIDE: Final = {
    "lora embedding",
    "lora both",
    "lora embedding, tied",
    "dora embedding",
    "dora embedding, tied",
    "saved embedding",
    "saved both",
    "saved embedding, tied",
    "lora and different rows",
    "rows and a saved head",
    "new tokens in saved modules",
}
#: An untied head gets noise for new tokens unless the adapter brings its rows, or the whole of it.
HEADLESS: Final = {"new rows", "lora and new rows"}
#: What does not concern the vocabulary need not meet every way of storing one.
LINEAR: Final = {"rslora", "patterns", "dora", "one layer", "lora bias", "bias all", "bias lora_only", "parameter"}
#: The head of an untied T5 says "tied" in its config: resizing ties it, and PEFT refuses what would need it apart.
NOT_FOR_UNTIED_T5: Final = {"rows and lora of the head", "new rows of both", "new rows of both, embedding saved"}


def refusal(family: str, layout: str, kind: str) -> tuple[type[TTExportError], str] | None:
    """The error of a plain merge and what it has to say; None where the merge succeeds."""
    tied = layout != "untied"
    if kind == "lora bias" and not FAMILIES[family].biased:
        return NotExpressible, "has no bias in the base"
    if family == "t5" and kind in ONE_SIDE:
        return NotExpressible, "encoder and decoder have an embedding module each"
    if tied and kind in NEVER_RAN:
        return NotExpressible, "one tensor for both"
    if tied and (kind in PART_THE_TWO or (family == "gpt2" and kind in UNKNOWN_TO_PEFT)):
        return NotExpressible, "--untie"
    if not tied and kind in HEADLESS and family == "t5":
        return NotExpressible, "although the config ties it"
    # PEFT finds "wte" by its name and saves the whole head beside it; of other rows it saves the embedding alone.
    if not tied and (kind in HEADLESS or (kind == "new rows, embedding saved" and family in ("llama", "gemma3"))):
        return BadInput, "expected the adapters to set every new row"
    return None


def cells() -> list[Cell]:
    return [
        (family, layout, kind)
        for family, facts in FAMILIES.items()
        for layout in facts.layouts
        for kind in KINDS
        if not (kind in LINEAR and layout not in ("tied", "nested"))
        and not (kind in NOT_FOR_UNTIED_T5 and (family, layout) == ("t5", "untied"))
    ]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("cell", cells(), ids="-".join)
def test_a_merged_checkpoint_computes_what_the_unmerged_model_computes(
    cell: Cell, bench: Bench, tmp_path: Path
) -> None:
    family, layout, kind = cell
    base, adapter, untie = bench.base(family, layout), bench.adapter(*cell), False
    if (error := refusal(*cell)) is not None:
        with pytest.raises(error[0], match=error[1]):
            merge(base, [adapter], tmp_path / "out")
        if not (untie := error[1] == "--untie"):
            return
    out = merge(base, [adapter], tmp_path / "merged", untie=untie)
    got = logits(reloaded(out, family), grown=KINDS[kind].grows)
    assert (got - bench.unmerged(*cell)).abs().max().item() <= LOGITS_MAX_ABS
    require_untouched(out, base, adapter)
    require_verified(out, base, [adapter], untie=untie)
