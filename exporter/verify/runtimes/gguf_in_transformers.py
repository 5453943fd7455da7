"""Run a GGUF file with the GGUF loader of transformers, which dequantises the file to fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from exporter.tensors import Array
from exporter.verify.runtimes.job import serve
from exporter.verify.runtimes.torch_models import quiet, save_greedy, save_logits


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save the logits of sequence N as ``full.N`` and the tokens chosen greedily after prompt N as ``greedy.N``.

    ``job`` has the keys artifact, sequences, more (additional sequences, numbered after ``sequences``), greedy_prompts
    and greedy_tokens (number of tokens to choose).
    """
    quiet()
    # The loader parses the header twice and builds equal name tables for every module. With a large vocabulary, most of
    # the loader's time goes into parsing and tables.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, cache(getattr(gguf, name)))
    path = Path(job["artifact"])
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    ).eval()
    save_logits(model, [*job["sequences"], *job["more"]], "full", save)
    save_greedy(model, job["greedy_prompts"], job["greedy_tokens"], save)


if __name__ == "__main__":
    serve(compute)
