"""Run the reference in transformers and stock PEFT, in fp32 with unmerged adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, set_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.save_and_load import load_peft_weights

from exporter.sources.hf.checkpoint import HEADS
from exporter.tensors import Array
from exporter.verify.runtimes.job import serve
from exporter.verify.runtimes.rounding import rounded
from exporter.verify.runtimes.torch_models import load_checkpoint, quiet, save_greedy_margins, save_logits

_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save the untuned model's logits, and the tuned model's logits and scores for each rounding.

    Keys of the job: checkpoint, adapters, vocab, sequences (rounding → sequences), base_sequences, continuations
    (rounding → pairs of prompt and chosen tokens).
    ``base.N`` are the logits of the untuned model on base_sequences. ``BF16.N``, for example, are the logits with the
    rounding BF16, and ``BF16.best.N`` and ``BF16.behind.N`` are the scores. The rounding BF16 keeps norms and biases in
    fp32, as a GGUF in BF16 does. The rounding ``BF16 whole`` also rounds norms and biases, as a checkpoint does. The
    rounding ``F32`` is the tuned model as trained.
    """
    quiet()
    model = load_checkpoint(job["checkpoint"])
    if job["base_sequences"]:
        save_logits(model, job["base_sequences"], "base", save)
    if job["vocab"] != model.get_input_embeddings().num_embeddings:
        # The adapters overwrite every new row. Without mean_resizing, the call draws no random covariance.
        model.resize_token_embeddings(job["vocab"], mean_resizing=False)
    model = attach(model, job["adapters"])
    model.eval()
    for dtype, sequences in job["sequences"].items():
        name, _, whole = dtype.partition(" ")
        with rounded(model, _HALVES[name], vectors=bool(whole)) if name in _HALVES else nullcontext():
            save_logits(model, sequences, dtype, save)
            save_greedy_margins(model, job["continuations"].get(dtype, []), dtype, save)


def attach(model: Any, paths: Sequence[str]) -> Any:
    """Attach the adapters at ``paths`` to ``model``. All adapters are active and unmerged.

    A PeftModel has adapters of a single type, so each adapter type gets a separate PeftModel around the modules of
    ``model``.
    Raises ValueError if stock PEFT cannot load an adapter.
    """
    configs = {path: PeftConfig.from_pretrained(path) for path in paths}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied and any(_trains_both_uses(config) for config in configs.values()):
        _untie(model)
    for _, same_type in groupby(
        sorted(paths, key=lambda path: _load_order(configs[path])), lambda path: configs[path].peft_type
    ):
        if isinstance(model, PeftModel):
            model = model.get_base_model()
            del model.peft_config
        names = []
        for path in same_type:
            names.append(f"adapter_{paths.index(path)}")
            model = _load(model, names[-1], path)
        if len(names) > 1:
            model.base_model.set_adapter(names)
    return model


def _load_order(config: Any) -> tuple[bool, bool]:
    """Sort key for adapters.

    Loading an adapter disables the wrappers (rows, modules_to_save) of earlier adapters, so adapters with wrappers are
    loaded last.
    """
    wraps = getattr(config, "trainable_token_indices", None) or getattr(config, "modules_to_save", None)
    return config.peft_type == PeftType.LORA, bool(wraps)


def _load(model: Any, name: str, path: str) -> Any:
    try:
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, path, adapter_name=name, torch_device="cpu")
        _load_further(model, name, path)
    except (ValueError, TypeError, RuntimeError, KeyError) as exc:
        raise ValueError(
            f"{path}: stock PEFT cannot load the adapter onto the model: {' '.join(str(exc).split())}"
        ) from exc
    return model


def _load_further(model: PeftModel, name: str, path: str) -> None:
    rows = [layer for layer in model.modules() if isinstance(layer, TrainableTokensLayer)]
    if model.peft_type != PeftType.TRAINABLE_TOKENS or not any(layer.tied_adapter for layer in rows):
        model.load_adapter(path, adapter_name=name, torch_device="cpu")
        return
    # load_adapter would wrap the head twice, but a tied layer follows its partner without a wrapper.
    config: Any = PeftConfig.from_pretrained(path)
    model.peft_config[name] = config
    for layer in rows:
        layer.update_layer(name, config=config, tied_adapter=layer.tied_adapter)
    set_peft_model_state_dict(model, load_peft_weights(path, device="cpu"), adapter_name=name)


def _trains_both_uses(config: Any) -> bool:
    """True if the adapter has embedding rows and a whole head.

    PEFT loads an adapter with embedding rows and a whole head only onto an untied model.
    """
    saved = getattr(config, "modules_to_save", None) or []
    rows = getattr(config, "trainable_token_indices", None)
    return bool(rows) and any(name.rpartition(".")[2] in HEADS for name in saved)


def _untie(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


if __name__ == "__main__":
    serve(compute)
