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
from peft.utils import PeftType
from torch import nn

from tuner.config import TrainableTokensConfig
from tuner.model import TrainableTokensModel

__all__ = ["get_peft_model", "load_peft_model"]

# PEFT chooses the tuner class from a table of the whole process, while it builds the model.
_TABLE_LOCK = threading.RLock()


@contextmanager
def _our_tuner() -> Iterator[None]:
    """Put our tuner class into PEFT's table for the time of the block."""
    with _TABLE_LOCK, warnings.catch_warnings():
        # PEFT asks transformers for an attribute that was renamed; a user cannot do anything about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        stock = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TRAINABLE_TOKENS]
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TRAINABLE_TOKENS] = TrainableTokensModel
        try:
            yield
        finally:
            PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TRAINABLE_TOKENS] = stock


def get_peft_model(
    model: nn.Module, peft_config: TrainableTokensConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Return ``model`` as a ``peft.PeftModel`` whose tuner is ours; ``kwargs`` as in ``peft.get_peft_model``.

    ``peft_config`` may be PEFT's own TrainableTokensConfig too. Afterwards stock PEFT is as it was before.
    """
    with _our_tuner():
        wrapped: PeftModel = peft.get_peft_model(model, peft_config, adapter_name, **kwargs)
        return wrapped


def load_peft_model(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """Load an adapter folder, written by stock PEFT (any layout) or by us.

    ``kwargs`` as in ``peft.PeftModel.from_pretrained``.
    """
    with _our_tuner():
        return PeftModel.from_pretrained(model, path, **kwargs)
