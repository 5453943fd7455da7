"""Getting PEFT to use this package's classes, without leaving a trace when it is over."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import trainable_tokens as stock
from peft.utils import PeftType
from torch import nn

from tuner.config import TrainableTokensConfig
from tuner.layer import TrainableTokensLayer
from tuner.model import TrainableTokensModel

__all__ = ["enabled", "get_peft_model", "load_peft_model"]

# PEFT takes the classes from two places of the whole process: a table for the tuner of an adapter's kind, and its own
# package for the rows beside a LoRA adapter. Both are read while a model is built and again when one is loaded.
_LOCK = threading.RLock()


@contextmanager
def enabled() -> Iterator[None]:
    """Let PEFT use our classes for token rows inside the block, those beside a LoRA adapter included.

    Models made inside keep working afterwards. The classes are swapped for the whole process; other threads that enter
    wait, and those that use PEFT directly get our classes, which behave the same.
    """
    with _LOCK:
        model, layer = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TRAINABLE_TOKENS], stock.TrainableTokensLayer
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TRAINABLE_TOKENS] = TrainableTokensModel
        vars(stock)["TrainableTokensLayer"] = TrainableTokensLayer
        try:
            yield
        finally:
            PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TRAINABLE_TOKENS] = model
            vars(stock)["TrainableTokensLayer"] = layer


@contextmanager
def _without_noise() -> Iterator[None]:
    """Hide that PEFT asks transformers for an attribute that was renamed; a user cannot do anything about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def get_peft_model(
    model: nn.Module, peft_config: TrainableTokensConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Return ``model`` as a ``peft.PeftModel`` whose tuner is ours; ``kwargs`` as in ``peft.get_peft_model``.

    ``peft_config`` may be PEFT's own TrainableTokensConfig too. Afterwards stock PEFT is as it was before.
    """
    with enabled(), _without_noise():
        wrapped: PeftModel = peft.get_peft_model(model, peft_config, adapter_name, **kwargs)
        return wrapped


def load_peft_model(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """Load an adapter folder, written by stock PEFT (any layout) or by us.

    ``kwargs`` as in ``peft.PeftModel.from_pretrained``.
    """
    with enabled(), _without_noise():
        return PeftModel.from_pretrained(model, path, **kwargs)
