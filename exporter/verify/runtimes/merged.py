"""Run a merged checkpoint in plain transformers in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from exporter.tensors import Array
from exporter.verify.runtimes.job import serve
from exporter.verify.runtimes.torch_models import load_checkpoint, quiet, save_greedy, save_logits


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save ``full.N`` (logits of sequence N) and ``greedy.N`` (tokens chosen after prompt N).

    Keys of the job: artifact, sequences, greedy_prompts, greedy_tokens.
    """
    quiet()
    model = load_checkpoint(job["artifact"])
    save_logits(model, job["sequences"], "full", save)
    save_greedy(model, job["greedy_prompts"], job["greedy_tokens"], save)


if __name__ == "__main__":
    serve(compute)
