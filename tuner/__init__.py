"""Training of single token rows of a language model, at the cost of those rows.

The names below are loaded on first use: importing this package, or its command line, does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.config import TrainableTokensConfig
    from tuner.layer import TrainableTokensLayer
    from tuner.model import TrainableTokensModel
    from tuner.switch import Enabled, enable, get_peft_model, load_peft_model

__all__ = [
    "Enabled",
    "TrainableTokensConfig",
    "TrainableTokensLayer",
    "TrainableTokensModel",
    "enable",
    "get_peft_model",
    "load_peft_model",
]

_HOME = {
    "TrainableTokensConfig": "tuner.config",
    "TrainableTokensLayer": "tuner.layer",
    "TrainableTokensModel": "tuner.model",
    "Enabled": "tuner.switch",
    "enable": "tuner.switch",
    "get_peft_model": "tuner.switch",
    "load_peft_model": "tuner.switch",
}


def __getattr__(name: str) -> Any:
    """Import the public name's module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
