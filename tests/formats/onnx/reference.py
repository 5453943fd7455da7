"""Logits and tokens of transformers and stock PEFT, in float32, with unmerged adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from exporter.tensors import Array
from fixtures.adapters import load as load_base


def load(base: Path, adapter: Path | None = None) -> Any:
    model = load_base(base, dtype=torch.float32)
    if adapter is not None:
        vocab = len(AutoTokenizer.from_pretrained(adapter))
        if vocab > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(vocab, mean_resizing=False)
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[Array]:
    """One full pass a sequence, unpadded: (positions, vocabulary) each."""
    with torch.inference_mode():
        return [np.asarray(model(torch.tensor([list(ids)])).logits[0]) for ids in sequences]


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    # An encoder-decoder's output begins with its start token, any other's with the prompt.
    return [int(token) for token in out[0, 1 if model.config.is_encoder_decoder else len(prompt) :]]
