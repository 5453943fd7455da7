"""Find, check and load the base model of a training run.

The checkpoint is checked before loading, and its stored embedding is hashed for the training record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from exporter.errors import BadInput, NotExpressible, UnreadableFile
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.locate import locate
from tuner.layers.tying import input_embedding, output_embedding

__all__ = ["Base", "StoredTensor", "load_base", "open_base", "quiet", "stored_embedding"]

# Value of --dtype → torch dtype. "auto" keeps the dtype in the checkpoint.
_TORCH_DTYPES: Final[Mapping[str, torch.dtype | str]] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "auto": "auto",
}


@dataclass(frozen=True, slots=True)
class Base:
    """A base checkpoint, with the name and revision that an adapter trained on it records in its config.

    name: an absolute path, or a hub id without revision. revision: the branch, tag or commit that the user gave; None
    for a folder or the default branch.
    """

    name: str
    revision: str | None
    checkpoint: Checkpoint

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint; for a hub id, the snapshot folder in huggingface_hub's cache."""
        return self.checkpoint.path


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Name, dtype, shape and digest of a tensor stored in a checkpoint.

    The field ``digest`` is the SHA-256 of the tensor's bytes in hex.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


def open_base(base: str, *, quiet: bool = True) -> Base:
    """Find the checkpoint ``base`` and check the config and the headers of the safetensors files.

    The check loads no tensor. base: a folder or a hub id (``org/name`` or ``org/name@revision``); a hub id is read from
    huggingface_hub's cache or downloaded. quiet: print no message and no progress bar for a download. Raises:
    UnreadableFile or BadInput if the checkpoint is not valid, OutputError if the cache cannot be written.
    """
    located = locate(os.path.expanduser(base), asked_by="BASE", content="checkpoint", quiet=quiet)
    if located.repo is None:
        folder = located.path.resolve()
        return Base(str(folder), None, Checkpoint.open(folder))
    return Base(located.repo, base.partition("@")[2] or None, Checkpoint.open(located.path))


def load_base(base: Base, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer of ``base``, but run no code from the checkpoint.

    dtype: an element of ``tuner.spec.DTYPES``.

    FP8 and MXFP4 matrices are dequantised, because the kernels for these formats do not compute gradients.

    Raises: UnreadableFile if transformers cannot load the model, BadInput if the checkpoint lacks weights (transformers
    would initialise missing weights at random), NotExpressible if the model is an encoder-decoder model.
    """
    with _translated(base.folder), quiet():
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise NotExpressible(
            "tune",
            f"{config.model_type} is an encoder-decoder model, but ttexport tune trains only decoder-only models",
            instead="wrap the model with tuner.get_peft_model, and train it in your own training loop",
        )
    quantised = getattr(config, "quantization_config", None)
    if isinstance(quantised, dict):
        quantised["dequantize"] = True
    with _translated(base.folder), quiet():
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.folder,
            config=config,
            dtype=_TORCH_DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise BadInput(f"{base.folder}: expected a tensor named {missing[0]}, found no such tensor")
    if quantised:
        model = model.to(model.get_input_embeddings().weight.dtype)  # the dequantised matrices may have another dtype
    return model, tokenizer


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        raise UnreadableFile(folder, lines[0] if lines else type(exc).__name__) from exc


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings inside the block.

    ``ttexport tune`` itself reports everything that users must know.
    """
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def stored_embedding(base: Base, model: PreTrainedModel) -> StoredTensor:
    """Return name, dtype, shape and digest of the input embedding stored in the checkpoint.

    The embedding matrix is hashed block by block, so that memory contains only one block of rows at a time. In the
    checkpoint, the embedding's tensor may lack the prefix of the model class (such as ``model.``), or may be stored
    only under the name of the tied head. Raises: BadInput if no tensor of the checkpoint is the input embedding.
    """
    tensors = base.checkpoint.tensors
    modules = [module for module in (input_embedding(model), output_embedding(model)) if module is not None]
    names = [f"{name}.weight" for module in modules for name, other in model.named_modules() if other is module]
    for name in names:
        for stored in (name, name.removeprefix(f"{model.base_model_prefix}."), f"{model.base_model_prefix}.{name}"):
            if stored in tensors:
                spec = tensors[stored].spec
                return StoredTensor(stored, spec.dtype, spec.shape, base.checkpoint.digest(stored))
    raise BadInput(f"{base.folder}: expected a tensor named {' or '.join(names)}, found no such tensor")
