"""Run the reference model with unmerged adapters in fp32, using transformers and unmodified PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, set_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file

from exporter.sources.hf.safetensors import read_tensors
from exporter.sources.hf.tie import HEADS
from exporter.sources.peft.normal_keys import NormalKeys
from exporter.tensors import Array
from exporter.verify.runtimes.job import serve
from exporter.verify.runtimes.rounding import rounded
from exporter.verify.runtimes.torch_models import load_checkpoint, quiet, save_greedy_margins, save_logits

_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save logits of the untuned model and, for each rounding, logits and scores of greedy tokens of the tuned model.

    ``job`` has the keys checkpoint, adapters, vocab, sequences (rounding → sequences), base_sequences and continuations
    (rounding → pairs of a prompt and the tokens that an artifact chose).
    ``base.N`` are the logits of the untuned model for sequence N of base_sequences. For example, ``BF16.N`` are the
    tuned model's logits for sequence N with the rounding BF16. ``BF16.best.N`` and ``BF16.behind.N`` are the scores of
    continuation N. With the rounding BF16, norms and biases remain in fp32, as in a BF16 GGUF file. With the rounding
    ``BF16 whole``, norms and biases are also rounded, as in a BF16 checkpoint. With the rounding ``F32``, the tuned
    model is not rounded.
    """
    quiet()
    model = load_checkpoint(job["checkpoint"])
    if job["base_sequences"]:
        save_logits(model, job["base_sequences"], "base", save)
    if job["vocab"] != model.get_input_embeddings().num_embeddings:
        # The adapters overwrite every new row. Without mean_resizing, the call draws no random covariance.
        model.resize_token_embeddings(job["vocab"], mean_resizing=False)
    model = attach(model, job["adapters"])
    _keep_bias_of_heads(model)
    model.eval()
    for dtype, sequences in job["sequences"].items():
        name, _, whole = dtype.partition(" ")
        with rounded(model, _HALVES[name], vectors=bool(whole)) if name in _HALVES else nullcontext():
            save_logits(model, sequences, dtype, save)
            save_greedy_margins(model, job["continuations"].get(dtype, []), dtype, save)


def _keep_bias_of_heads(model: Any) -> None:
    """Add the head's bias for heads with trained token rows, because the forward pass of PEFT's wrapper omits the bias.

    If PEFT merges the wrapper, the bias of the head is kept. The bias is omitted in
    ``TrainableTokensLayer.forward_adapters`` of PEFT 0.21.
    """
    for module in model.modules():
        bias = getattr(module.base_layer, "bias", None) if isinstance(module, TrainableTokensLayer) else None
        if bias is not None:
            module.register_forward_hook(lambda _module, _inputs, output, bias=bias: output + bias)


def attach(model: Any, paths: Sequence[str]) -> Any:
    """Load the adapters at ``paths`` into ``model`` with PEFT. All adapters are active, and no adapter is merged.

    A PeftModel supports only one adapter type, so the adapters of each type are loaded through a separate PeftModel,
    which wraps modules of ``model``. PEFT ignores tensors with nonstandard names, so an adapter with nonstandard names
    is copied, renamed and loaded from the copy. Raises ValueError if unmodified PEFT cannot load an adapter.
    """
    with TemporaryDirectory() as scratch:
        return _attach(model, paths, [_as_peft_writes(path, Path(scratch, str(n))) for n, path in enumerate(paths)])


def _as_peft_writes(path: str, copy: Path) -> str:
    """If tensor names are nonstandard, copy the adapter to ``copy`` with standard names. Return the path to load."""
    weights = Path(path, SAFETENSORS_WEIGHTS_NAME)
    normal = NormalKeys.of(weights, read_tensors(weights))
    if not normal.differ:
        return path
    copy.mkdir()
    copyfile(Path(path, CONFIG_NAME), copy / CONFIG_NAME)
    save_file(
        {normal.keys[name]: tensor for name, tensor in load_file(weights).items()},
        copy / weights.name,
        {"format": "pt"},
    )
    return str(copy)


def _attach(model: Any, paths: Sequence[str], folders: Sequence[str]) -> Any:
    """Load the adapters at ``paths``; ``folders`` contains, for each adapter, the path of the files to read."""
    configs = {path: PeftConfig.from_pretrained(path) for path in paths}
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
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
            model = _load(model, names[-1], path, folders[paths.index(path)])
        if len(names) > 1:
            model.base_model.set_adapter(names)
    return model


def _load_order(config: Any) -> tuple[bool, bool]:
    """Return the sort key that determines when an adapter is loaded.

    When PEFT loads an adapter, PEFT disables the TrainableTokens and modules_to_save wrappers of earlier adapters.
    Adapters with TrainableTokens or modules_to_save wrappers are therefore loaded last.
    """
    wraps = getattr(config, "trainable_token_indices", None) or getattr(config, "modules_to_save", None)
    return config.peft_type == PeftType.LORA, bool(wraps)


def _load(model: Any, name: str, path: str, folder: str) -> Any:
    try:
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, folder, adapter_name=name, torch_device="cpu")
        _load_further(model, name, folder)
    except (ValueError, TypeError, RuntimeError, KeyError) as exc:
        raise ValueError(f"{path}: unmodified PEFT cannot load the adapter: {' '.join(str(exc).split())}") from exc
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
    """Whether the adapter contains both trained embedding rows and a whole LM head.

    PEFT can load an adapter with embedding rows and a whole LM head only if embedding and head of the model are not
    tied.
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
