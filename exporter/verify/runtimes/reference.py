"""The reference: transformers with stock PEFT, the adapters unmerged, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from exporter.tensors import Array
from exporter.verify.runtimes.job import serve
from exporter.verify.runtimes.torch_models import load_checkpoint, quiet, save_judgement, save_logits

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Job: checkpoint, adapters, vocab, dtypes, sequences, base_sequences, continuations (dtype → pairs).

    Saves ``base.N`` (the untuned model on base_sequences), and per dtype, the model rounded as a file in it holds it:
    ``BF16.N`` (logits), ``BF16.best.N`` and ``BF16.behind.N``. ``F32`` is the tuned model as trained.
    """
    quiet()
    model = load_checkpoint(job["checkpoint"])
    if job["base_sequences"]:
        save_logits(model, job["base_sequences"], "base", save)
    if job["vocab"] > model.get_input_embeddings().num_embeddings:
        # Every new row is overwritten by the adapters; without mean_resizing the call draws no random covariance.
        model.resize_token_embeddings(job["vocab"], mean_resizing=False)
    names = [f"adapter_{number}" for number in range(len(job["adapters"]))]
    for name, path in zip(names, job["adapters"], strict=True):
        if not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(model, path, adapter_name=name, torch_device="cpu")
        else:
            model.load_adapter(path, adapter_name=name, torch_device="cpu")
    if len(names) > 1:
        model.base_model.set_adapter(names)
    model.eval()
    for dtype in job["dtypes"]:
        with _rounded(model, _DTYPES[dtype]):
            save_logits(model, job["sequences"], dtype, save)
            save_judgement(model, job["continuations"].get(dtype, []), dtype, save)


@contextmanager
def _rounded(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Round matrices and trained rows to ``dtype`` and back to fp32 for a while.

    Vectors (norms, biases) are left alone: GGUF keeps them in fp32. Only what the rounding changes is kept aside.
    """
    originals = []
    with torch.no_grad():
        for parameter in model.parameters():
            rounded = parameter.to(dtype).to(parameter.dtype)
            if parameter.ndim > 1 and not torch.equal(rounded, parameter):
                originals.append((parameter, parameter.clone()))
                parameter.copy_(rounded)
        yield
        for parameter, original in originals:
            parameter.copy_(original)


if __name__ == "__main__":
    serve(compute)
