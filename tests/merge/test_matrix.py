"""Every type of adapter on every tie layout in four families: the merged checkpoint against stock PEFT, unmerged.

The reference is the trained model with unmerged adapters, not PEFT's own merge: where embedding and head share a
tensor, PEFT applies some adapters twice and loses others, as a test below shows.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Final

import pytest
import torch

from exporter.errors import BadInput, NotExpressible, TTExportError
from fixtures.hostile import rawtensors
from fixtures.models.tie_layouts import FAMILIES
from fixtures.peft_adapters import RECIPES
from tests.merge.tuned import (
    LOGITS_MAX_ABS,
    Bench,
    difference,
    logits,
    merge,
    reloaded,
    require_untouched,
    require_verified,
    stored,
    values,
)

Cell = tuple[str, str, str]

#: On a tied base these make head and embedding differ: one tensor cannot hold both.
SPLIT_THE_TIE: Final = {
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
#: PEFT recognises tied embeddings by a few names, and "wte" is not among them.
UNKNOWN_TO_PEFT: Final = {"lora embedding, tied", "saved embedding, tied"}
#: PEFT 0.21 creates these on a tied base, but cannot run them: the head's rows are wrapped twice.
NOT_RUNNABLE: Final = {"rows of both", "new rows of both", "new rows of both, embedding saved"}
#: T5's encoder and decoder run embedding modules of their own, which PEFT leaves out here, so that the rows differ.
ONE_SIDE: Final = {"lora and different rows", "rows and a saved head"}
#: T5 never runs "shared", so that a copy or an update of "shared" has no effect.
WITHOUT_EFFECT: Final = {
    "lora embedding",
    "lora embedding, tied",
    "dora embedding",
    "dora embedding, tied",
    "saved embedding",
    "saved embedding, tied",
}
#: Adapters without rows for the new tokens of an untied head, which would otherwise be noise.
HEADLESS: Final = {"new rows", "lora and new rows"}
#: Adapters that do not change the vocabulary, or change it like another one, are tested on a few layouts.
IN_FEW: Final = {
    "other rows",
    "rslora",
    "patterns",
    "dora",
    "one layer",
    "lora bias",
    "bias all",
    "bias lora_only",
    "parameter",
}
#: The config of an untied T5 has a tied head: resizing ties it, and PEFT refuses adapters that need it untied.
NOT_FOR_UNTIED_T5: Final = {"rows and lora of the head", "new rows of both", "new rows of both, embedding saved"}


def refusal(family: str, layout: str, kind: str) -> tuple[type[TTExportError], str] | None:
    """The error of a plain merge and its message; None where the merge succeeds."""
    tied = layout != "untied"
    if kind == "lora bias" and not FAMILIES[family].biased:
        return NotExpressible, "has no bias in the base"
    if family == "t5" and kind in ONE_SIDE:
        return NotExpressible, "encoder and decoder use separate embedding modules, but PEFT trained only "
    if family == "t5" and kind in WITHOUT_EFFECT:
        return None
    if tied and kind in NOT_RUNNABLE:
        return NotExpressible, "the model uses a single tensor for both names"
    if tied and (kind in SPLIT_THE_TIE or (family == "gpt2" and kind in UNKNOWN_TO_PEFT)):
        return NotExpressible, "--untie"
    if not tied and kind in HEADLESS and family == "t5":
        return NotExpressible, "although the config ties embedding and head"
    # PEFT recognises "wte" by its name and also saves the whole head; otherwise it saves only the embedding.
    if not tied and (kind in HEADLESS or (kind == "new rows, embedding saved" and family in ("llama", "gemma3"))):
        return BadInput, "expected the adapters to set the new rows"
    return None


def cells() -> list[Cell]:
    return [
        (family, layout, kind)
        for family, facts in FAMILIES.items()
        for layout in facts.layouts
        for kind in RECIPES
        if not (kind in IN_FEW and layout not in ("tied", "nested"))
        and not (kind in NOT_FOR_UNTIED_T5 and (family, layout) == ("t5", "untied"))
    ]


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
    got = logits(reloaded(out, family), grown=RECIPES[kind].grows)
    assert difference(got, bench.unmerged(*cell)) <= LOGITS_MAX_ABS
    require_untouched(out, base, adapter)
    require_verified(out, base, [adapter], untie=untie)


def mergeable(kinds: set[str], layouts: set[str]) -> list[Cell]:
    return [cell for cell in cells() if cell[1] in layouts and cell[2] in kinds and not refusal(*cell)]


@pytest.mark.parametrize(
    ("family", "layout", "kind"),
    mergeable(
        {"rows", "lora", "lora and rows", "lora embedding, tied", "new rows"}, {"tied", "duplicate", "nested", "copies"}
    ),
)
def test_with_untie_the_head_gets_a_tensor_of_its_own_and_computes_the_same(
    family: str, layout: str, kind: str, bench: Bench, tmp_path: Path
) -> None:
    base, adapter = bench.base(family, layout), bench.adapter(family, layout, kind)
    out = merge(base, [adapter], tmp_path / "out", untie=True)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert sum(name.endswith("lm_head.weight") for name in stored(out)) == 1
    model = reloaded(out, family)
    assert difference(logits(model, grown=RECIPES[kind].grows), bench.unmerged(family, layout, kind)) <= LOGITS_MAX_ABS
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight or family == "t5"
    require_verified(out, base, [adapter], untie=True)


@pytest.mark.parametrize("kind", ["lora embedding, tied", "lora and different rows", "rows of the head"])
def test_pefts_own_merge_into_a_tied_base_differs_from_the_trained_model(
    kind: str, bench: Bench, tmp_path: Path
) -> None:
    """PEFT adds the tied update twice to the one tensor, and also sets rows of one use in the other."""
    base, adapter = bench.base("llama", "tied"), bench.adapter("llama", "tied", kind)
    unmerged = bench.unmerged("llama", "tied", kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(bench.tuned("llama", "tied", [adapter]).merge_and_unload())
    assert difference(theirs, unmerged) > 0.1
    ours = merge(base, [adapter], tmp_path / "out", untie=kind in SPLIT_THE_TIE)
    assert difference(logits(reloaded(ours, "llama")), unmerged) <= LOGITS_MAX_ABS


@pytest.mark.parametrize(
    ("family", "layout", "kind"),
    mergeable(
        {"rows", "lora", "dora", "bias all", "lora embedding, tied", "saved norm", "lora and rows", "new rows"},
        {"tied"},
    ),
)
def test_a_bf16_base_gets_the_fp32_result_rounded_once(
    family: str, layout: str, kind: str, bench: Bench, tmp_path: Path
) -> None:
    half, adapter = bench.base(family, layout, "bfloat16"), bench.adapter(family, layout, kind)
    out = merge(half, [adapter], tmp_path / "out")
    wide = merge(merge(half, [], tmp_path / "wide", dtype="F32"), [adapter], tmp_path / "merged")
    want = {name: values(tensor).to(torch.bfloat16) for name, tensor in stored(wide).items()}
    got = {name: values(tensor) for name, tensor in stored(out).items()}
    assert want.keys() == got.keys()
    assert [name for name in want if not torch.equal(want[name], got[name])] == []
    require_verified(out, half, [adapter])


def test_a_saved_head_inside_the_wrapper_of_its_rows_is_still_a_head(bench: Bench, tmp_path: Path) -> None:
    """PEFT 0.21 uses this name on a tied base; it is a trained copy, not a base tensor that the embedding shares."""
    base, adapter = bench.base("llama", "tied"), bench.adapter("llama", "tied", "rows and a saved head")
    renamed = tmp_path / "adapter"
    renamed.mkdir()
    for path in adapter.iterdir():
        (renamed / path.name).write_bytes(path.read_bytes())
    weights, key = renamed / "adapter_model.safetensors", "base_model.model.lm_head.weight"
    head = stored(renamed, weights.name)[key]
    rawtensors.remove(weights, key)
    rawtensors.replace(weights, {"base_model.model.lm_head.token_adapter.base_layer.weight": head})
    with pytest.raises(NotExpressible, match="--untie"):
        merge(base, [renamed], tmp_path / "tied")
    first, second = (merge(base, [path], tmp_path / str(n), untie=True) for n, path in enumerate((adapter, renamed)))
    assert stored(first) == stored(second)
