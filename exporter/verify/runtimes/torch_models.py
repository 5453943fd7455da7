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
def save_greedy(model: Any, prompts: Sequence[Sequence[int]], tokens: int, save: Callable[[str, Array], None]) -> None:
    """Save ``greedy.N`` (tokens,): what the model chooses after each prompt, decoding with its cache."""
    for number, prompt in enumerate(prompts):
        ids, cache = torch.tensor([list(prompt)]), None
        chosen = []
        for _ in range(tokens):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            chosen.append(int(ids))
        save(f"greedy.{number}", np.array(chosen, np.int64))


@torch.no_grad()
def save_judgement(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], name: str, save: Callable[[str, Array], None]
) -> None:
    """Judge the tokens that another runtime chose greedily: one pass over prompt and tokens decides all steps.

    For each (prompt, chosen) saves ``name.best.N``, the best token at each step, and ``name.behind.N``, how far the
    chosen one's logit is behind it.
    """
    for number, (prompt, chosen) in enumerate(pairs):
        logits = model(input_ids=torch.tensor([[*prompt, *chosen]]), use_cache=False).logits[0].float()
        steps = logits[len(prompt) - 1 : -1]
        best = steps.max(dim=-1)
        behind = best.values - steps[torch.arange(len(chosen)), torch.tensor(list(chosen))]
        save(f"{name}.best.{number}", best.indices.numpy())
        save(f"{name}.behind.{number}", behind.double().numpy())
