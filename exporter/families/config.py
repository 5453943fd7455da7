"""Read typed values from config.json, and raise an error that names the config key if a value is missing or invalid.

If the config lacks a value, the default given by the caller is used; without a default, an error is raised.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any, Final, Literal

from exporter.errors import BadInput, NotExpressible

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]

#: Hugging Face's names of the supported activations. Source: transformers.activations.ACT2FN.
_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
#: Limits far above those of any real model, so that a broken config cannot fill memory with tensor names.
_MAX_LAYERS: Final = 10_000
_MAX_MEMBERS: Final = 4096


class Settings:
    """A table from config.json that validates each value when the value is read."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        """Wrap ``table``, which is a parsed config.json or its ``text_config`` table."""
        self.table = table

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive 31-bit integer, or ``default`` if the key is absent or null.

        Raises BadInput for any value that is not a positive 31-bit integer.
        """
        value = self.table.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise BadInput(f"config.json: {key}: expected a positive 31-bit integer, found {value!r:.80}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number above 0, or ``default`` if the key is absent.

        Raises BadInput for any value that is not a finite number above 0.
        """
        value = self.table.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise BadInput(f"config.json: {key}: expected a number above 0, found {value!r:.80}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean, or ``default`` if the key is absent or null.

        Raises BadInput if the value is not a boolean.
        """
        value = self.table.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise BadInput(f"config.json: {key}: expected true or false, found {value!r:.80}")
        return value

    def layers(self, key: str = "num_hidden_layers") -> int:
        """Return the number of layers. Raises BadInput if the number of layers is missing or above ``_MAX_LAYERS``."""
        return self.at_most(key, _MAX_LAYERS)

    def experts(self, *keys: str) -> int:
        """Return the number of experts, which is the value of the first key in ``keys`` that the config contains.

        Raises BadInput if the number of experts is invalid.
        """
        return self.at_most(next((key for key in keys if self.table.get(key) is not None), keys[0]), _MAX_MEMBERS)

    def at_most(self, key: str, limit: int) -> int:
        """Return a positive integer up to ``limit``.

        Raises BadInput if the value is not a positive integer or is above ``limit``.
        """
        value = self.integer(key)
        if value > limit:
            raise BadInput(f"config.json: {key}: expected at most {limit}, found {value}")
        return value

    def activation(self, family: str, key: str, default: str, allowed: Collection[Activation]) -> Activation:
        """Return the name of the activation function that the config gives under ``key``.

        Raises NotExpressible for an activation function that is not in ``allowed``.
        """
        name = self.table.get(key, default)
        activation = _ACTIVATIONS.get(name) if isinstance(name, str) else None
        if activation is None or activation not in allowed:
            raise NotExpressible(family, f"{key} {name!r:.80} is not supported for this model family")
        return activation
