"""What the transformers runtimes share: logits and greedy tokens of a causal language model in fp32."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from exporter.tensors import Array


def quiet() -> None:
    """Only what a verdict needs goes to stderr: its last line is the reason that the user reads."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_checkpoint(path: str) -> Any:
    """The causal language model in ``path``, fp32, in evaluation mode; nothing missing, nothing left over."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ValueError(f"{path}: {problem}: {', '.join(sorted(map(str, info[problem])))}")
    return model.eval()


@torch.no_grad()
def save_logits(model: Any, sequences: Sequence[Sequence[int]], name: str, save: Callable[[str, Array], None]) -> None:
    """Save ``name.N`` for every sequence: (positions, vocabulary) float32."""
    for number, ids in enumerate(sequences):
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        save(f"{name}.{number}", logits.float().numpy())


@torch.no_grad()
def save_greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    save: Callable[[str, Array], None],
    prefix: str = "",
) -> None:
    """Save ``greedy.N`` (tokens,) and ``margin.N`` (tokens,): how far the best logit is ahead of the second."""
    for number, prompt in enumerate(prompts):
        ids, cache = torch.tensor([list(prompt)]), None
        chosen, margins = [], []
        for _ in range(tokens):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            best = out.logits[0, -1].float().topk(2)
            chosen.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            ids, cache = best.indices[:1].reshape(1, 1), out.past_key_values
        save(f"{prefix}greedy.{number}", np.array(chosen, np.int64))
        save(f"{prefix}margin.{number}", np.array(margins, np.float64))
