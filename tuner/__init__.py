"""Train the embedding rows of selected tokens of a language model.

Gradients and optimizer state exist only for the trained rows, so the extra time and memory depend on the number of
trained rows and not on the vocabulary size.

The functions and classes in this package are imported on first use. Importing this package or its command line does not
import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.lazy import lazy_attributes

if TYPE_CHECKING:
    from tuner.layers.config import TrainableTokensConfig
    from tuner.layers.layer import TrainableTokensLayer
    from tuner.layers.model import TrainableTokensModel
    from tuner.layers.switch import Enabled, enable, get_peft_model, load_peft_model

__all__ = [
    "Enabled",
    "TrainableTokensConfig",
    "TrainableTokensLayer",
    "TrainableTokensModel",
    "enable",
    "get_peft_model",
    "load_peft_model",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "Enabled": "tuner.layers.switch",
        "TrainableTokensConfig": "tuner.layers.config",
        "TrainableTokensLayer": "tuner.layers.layer",
        "TrainableTokensModel": "tuner.layers.model",
        "enable": "tuner.layers.switch",
        "get_peft_model": "tuner.layers.switch",
        "load_peft_model": "tuner.layers.switch",
    },
)
