"""Adapters whose tokenizers nest are merged with the larger tokenizer; tokenizers that contradict are refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TrainableTokensConfig, get_peft_model
from transformers import AutoTokenizer

from exporter.errors import BadInput
from exporter.merge.vocabulary.nesting import largest
from exporter.sources.hf.checkpoint import auxiliary_files
from fixtures.models.tie_layouts import VOCAB, build, tokenizer
from fixtures.peft_adapters import IDS, NEW_TOKENS, perturb
from tests.merge.tuned import LOGITS_MAX_ABS, attached, difference, logits, merge, reloaded, require_verified


def saved(folder: Path, *new: str, special: tuple[str, ...] = ()) -> dict[str, Path]:
    made = tokenizer(new)
    made.add_tokens(list(special), special_tokens=True)
    made.save_pretrained(folder)
    return auxiliary_files(folder)


def trained(base: Path, folder: Path, ids: tuple[int, ...], *new: str) -> Path:
    model = reloaded(base)
    torch.manual_seed(0)
    if new:
        model.resize_token_embeddings(VOCAB + len(new), mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned: Any = get_peft_model(model, TrainableTokensConfig(token_indices=list(ids)))
        perturb(tuned, len(new))
        tuned.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer(new).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("smaller", [0, 2])
@pytest.mark.parametrize("larger_first", [False, True])
def test_the_larger_tokenizer_serves_both_adapters(larger_first: bool, smaller: int, tmp_path: Path) -> None:
    base = build(tmp_path / "base", "llama", "tied")
    small = trained(base, tmp_path / "small", (*IDS, *range(VOCAB, VOCAB + smaller)), *NEW_TOKENS[:smaller])
    large = trained(base, tmp_path / "large", tuple(range(VOCAB + smaller, VOCAB + 3)), *NEW_TOKENS)
    adapters = [large, small] if larger_first else [small, large]
    grown = reloaded(base)
    grown.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    want = logits(attached(grown, adapters), grown=True)
    out = merge(base, adapters, tmp_path / "out")
    assert difference(logits(reloaded(out), grown=True), want) <= LOGITS_MAX_ABS
    assert (out / "tokenizer.json").read_bytes() == (large / "tokenizer.json").read_bytes()
    assert len(AutoTokenizer.from_pretrained(out)) == VOCAB + 3
    require_verified(out, base, adapters)


def test_tokenizers_with_different_new_tokens_are_refused(tmp_path: Path) -> None:
    base = build(tmp_path / "base", "llama", "tied")
    first = trained(base, tmp_path / "first", (VOCAB,), "<lamp>")
    second = trained(base, tmp_path / "second", (VOCAB + 1,), "<ship>", "<fog>")
    for adapters in ([first, second], [second, first]):
        with pytest.raises(BadInput, match=r"or a tokenizer that differs only by additional added tokens"):
            merge(base, adapters, tmp_path / "out")


def test_the_largest_of_several_tokenizers_contains_all_others(tmp_path: Path) -> None:
    files = [saved(tmp_path / str(count), *NEW_TOKENS[:count]) for count in (1, 3, 0, 2)]
    assert largest(files) is files[1]
    assert largest([files[0], files[2]]) is files[0]
    assert largest([*files, saved(tmp_path / "other", "<other>")]) is None
    assert largest([]) is None


def test_added_special_tokens_are_contained_with_their_lists(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", special=("<a>",))
    large = saved(tmp_path / "large", special=("<a>", "<b>"))
    assert largest([small, large]) is large


def test_lists_of_tokens_are_contained_item_by_item(tmp_path: Path) -> None:
    small, large = saved(tmp_path / "small", special=("<a>",)), saved(tmp_path / "large", special=("<a>", "<b>"))
    key = "additional_special_tokens"
    edited(small["tokenizer_config.json"], lambda content: content.update({key: ["<a>"]}))
    edited(large["tokenizer_config.json"], lambda content: content.update({key: ["<b>", "<a>"]}))
    assert largest([small, large]) is large
    edited(large["tokenizer_config.json"], lambda content: content.update({key: ["<b>"]}))
    assert largest([small, large]) is None


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "flag": ("tokenizer.json", lambda content: content["added_tokens"][0].update(lstrip=True)),
    "id": ("tokenizer.json", lambda content: content["added_tokens"][-1].update(id=VOCAB + 5)),
    "vocabulary": ("tokenizer.json", lambda content: content["model"]["vocab"].update(w3=4, w4=3)),
    "pre-tokenizer": ("tokenizer.json", lambda content: content.update(pre_tokenizer={"type": "Whitespace"})),
    "normalizer": ("tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"})),
    "end token": ("tokenizer_config.json", lambda content: content.update(eos_token="w2")),
    "list of tokens": ("tokenizer_config.json", lambda content: content.update(extra_special_tokens=["<fog>"])),
    "not a tokenizer": ("tokenizer.json", lambda content: content.clear()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_any_other_difference_prevents_nesting(edit: str, tmp_path: Path) -> None:
    small, large = saved(tmp_path / "small", "<lamp>"), saved(tmp_path / "large", "<lamp>", "<ship>")
    assert largest([small, large]) is large
    name, change = EDITS[edit]
    edited(small[name], dict)
    assert largest([small, large]) is large, "writing a file anew does not change it"
    edited(small[name], change)
    assert largest([small, large]) is None
    assert largest([large, small]) is None


def test_tokenizers_with_different_files_do_not_nest(tmp_path: Path) -> None:
    small, large = saved(tmp_path / "small"), saved(tmp_path / "large", "<lamp>")
    (tmp_path / "small" / "merges.txt").write_text("")
    assert largest([auxiliary_files(tmp_path / "small"), large]) is None
    (tmp_path / "large" / "merges.txt").write_text("a b")
    assert largest([auxiliary_files(tmp_path / name) for name in ("small", "large")]) is None
    assert largest([small, large]) is large


def test_files_of_added_tokens_are_contained_by_text_and_id(tmp_path: Path) -> None:
    saved(tmp_path / "small", "<lamp>"), saved(tmp_path / "large", "<lamp>", "<ship>")
    for name, ids in (("small", {"<lamp>": VOCAB}), ("large", {"<lamp>": VOCAB, "<ship>": VOCAB + 1})):
        (tmp_path / name / "added_tokens.json").write_text(json.dumps(ids))
    files = [auxiliary_files(tmp_path / name) for name in ("small", "large")]
    assert largest(files) is files[1]
    (tmp_path / "small" / "added_tokens.json").write_text(json.dumps({"<lamp>": VOCAB + 1}))
    assert largest(files) is None
