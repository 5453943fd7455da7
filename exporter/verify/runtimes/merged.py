"""Run a merged checkpoint in transformers in fp32, without PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from exporter.tensors import Array
from exporter.verify.runtimes.job import serve
from exporter.verify.runtimes.torch_models import load_checkpoint, quiet, save_greedy, save_logits


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save the logits of sequence N as ``full.N`` and the tokens chosen greedily after prompt N as ``greedy.N``.

    ``job`` has the keys artifact, sequences, greedy_prompts and greedy_tokens (number of tokens to choose).
    """
    quiet()
    model = load_checkpoint(job["artifact"])
    save_logits(model, job["sequences"], "full", save)
    save_greedy(model, job["greedy_prompts"], job["greedy_tokens"], save)


if __name__ == "__main__":
    serve(compute)
