"""The base model of a training run: checked before it is loaded, loaded without surprises, known by a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from exporter.errors import BadInput, NotExpressible, UnreadableFile
from tuner.layers.tying import input_embedding, output_embedding

__all__ = ["Base", "StoredTensor", "load_base", "open_base", "quiet", "stored_embedding"]

DTYPES: Final = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

_INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth")
_HUB_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint folder. ``given`` is what adapters record: an absolute path, or the hub id as the user wrote it."""

    given: str
    folder: Path


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the checkpoint stores it; ``digest`` is the SHA-256 of its bytes in hex."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


def open_base(given: str) -> Base:
    """Find the checkpoint and check that it has a config and safetensors weights; nothing is loaded.

    ``given`` is a folder, or a hub id found in the local cache or downloaded. Raises: UnreadableFile, BadInput.
    """
    path = Path(given).expanduser()
    base = Base(str(path.resolve()), path.resolve()) if path.exists() else Base(given, _from_hub(given))
    _read_json(base.folder / "config.json")
    if not any(base.folder.glob("*.safetensors")):
        pickles = sorted(found.name for pattern in _PICKLES for found in base.folder.glob(pattern))
        if pickles:
            raise BadInput(
                f"{base.folder / pickles[0]}: expected safetensors weights, found pickle, which is never read; convert "
                "it in a place you trust: AutoModelForCausalLM.from_pretrained(A).save_pretrained(B)"
            )
        raise BadInput(f"{base.folder}: expected *.safetensors weights, found none")
    return base


def _from_hub(given: str) -> Path:
    try:
        return Path(snapshot_download(given, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError, HFValidationError) as exc:
        raise UnreadableFile(given, "no such folder, and no such model in the local hub cache or online") from exc


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as exc:
        raise UnreadableFile(path, "no such file; expected a Hugging Face checkpoint folder") from exc
    except (OSError, ValueError) as exc:
        raise UnreadableFile(path, f"not readable as JSON: {exc}") from exc


def load_base(base: Base, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer; remote code is never run. dtype: ``auto`` (as stored) or a key of ``DTYPES``.

    Raises: UnreadableFile when transformers cannot load it, BadInput when weights are missing in the checkpoint (they
    would be random), NotExpressible for encoder-decoder models.
    """
    with _translated(base.folder), quiet():
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise NotExpressible(
            "tune",
            f"{config.model_type} is an encoder-decoder model, and texts do not say what is input and what is output",
            instead="tuner.get_peft_model works in a training loop of your own",
        )
    with _translated(base.folder), quiet():
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.folder,
            config=config,
            dtype=DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise BadInput(f"{base.folder}: expected the tensor {missing[0]}, found none of that name")
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
    """Silence transformers' progress bars and warnings for the block; what matters to a user, we say."""
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
    """Return the input embedding as the checkpoint stores it. Memory: that one tensor, mapped.

    The stored name may lack the model's prefix, or be the tied head's. Raises: BadInput when no tensor matches.
    """
    files = _tensor_files(base.folder)
    modules = [module for module in (input_embedding(model), output_embedding(model)) if module is not None]
    wanted = [f"{name}.weight" for module in modules for name, other in model.named_modules() if other is module]
    for name in wanted:
        for stored in (name, name.removeprefix(f"{model.base_model_prefix}."), f"{model.base_model_prefix}.{name}"):
            if stored in files:
                return _digest(files[stored], stored)
    raise BadInput(f"{base.folder}: expected a tensor named {' or '.join(wanted)}, found none")


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Map tensor names to the files that hold them."""
    index = folder / _INDEX
    if index.exists():
        return {name: folder / file for name, file in _read_json(index)["weight_map"].items()}
    single = folder / "model.safetensors"
    names: dict[str, Path] = {}
    for path in [single] if single.exists() else sorted(folder.glob("*.safetensors")):
        with _translated(path), safe_open(path, framework="pt") as file:
            names.update(dict.fromkeys(file.keys(), path))
    return names


def _digest(path: Path, name: str) -> StoredTensor:
    with _translated(path), safe_open(path, framework="pt") as file:
        dtype = file.get_slice(name).get_dtype()
        tensor = file.get_tensor(name)
        raw = tensor.contiguous().view(torch.uint8).numpy()
        return StoredTensor(name, dtype, tuple(tensor.shape), hashlib.sha256(raw).hexdigest())
