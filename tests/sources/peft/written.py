"""Adapters that stock PEFT writes for tiny models, with the logits of the model that wrote them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model

from fixtures.models.tie_layouts import VOCAB, build, tokenizer
from fixtures.peft_adapters import NEW_TOKENS, perturb
from tests.merge.tuned import LOGITS_MAX_ABS, difference, logits, merge, reloaded, require_verified


@dataclass(frozen=True)
class Written:
    """base, adapter: folders. logits: of the trained model in memory, unmerged. grown: whether tokens were added."""

    base: Path
    adapter: Path
    logits: torch.Tensor
    grown: bool = False


def write(
    folder: Path,
    config: PeftConfig,
    *,
    layout: str = "untied",
    grown: bool = False,
    embeddings: bool | str = "auto",
    name: str = "default",
) -> Written:
    """Write a llama, and an adapter for the llama, below ``folder``. name: PEFT's name of the adapter.

    embeddings: PEFT's save_embedding_layers.
    """
    base = folder / layout
    if not base.exists():
        build(base, "llama", layout)
    model = reloaded(base)
    if grown:
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCAB + len(NEW_TOKENS), mean_resizing=False)
    adapter = folder / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of ties
        tuned: Any = get_peft_model(model, config, adapter_name=name)
        perturb(tuned, 0)
        want = logits(tuned.eval(), grown=grown)
        tuned.save_pretrained(adapter, save_embedding_layers=embeddings)
    if grown:
        tokenizer(NEW_TOKENS).save_pretrained(adapter)
    return Written(base, adapter, want, grown)


def require_merged_as_trained(written: Written, out: Path) -> None:
    """The merged checkpoint must compute what the unmerged model computes, and must pass verification."""
    merge(written.base, [written.adapter], out)
    assert difference(logits(reloaded(out), grown=written.grown), written.logits) <= LOGITS_MAX_ABS
    untuned = logits(reloaded(written.base))
    assert difference(untuned, written.logits[:, : untuned.shape[1], : untuned.shape[2]]) > 0.01
    require_verified(out, written.base, [written.adapter])
