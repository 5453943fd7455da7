"""Configuration of trained token rows: PEFT's own, plus a switch that PEFT expresses through ``target_modules``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import TrainableTokensConfig as PeftTrainableTokensConfig

__all__ = ["TrainableTokensConfig"]

# Fields that stock PEFT does not know. They take effect before the adapter is built, in PEFT's own fields.
_OWN_FIELDS = ("train_head",)


@dataclass
class TrainableTokensConfig(PeftTrainableTokensConfig):
    """The token rows to train; saved files are those of stock PEFT.

    token_indices: distinct ids in [0, V).  target_modules: embedding(s) to wrap; None finds the input embedding.
    init_weights: rows start as the base's (True) or at random.  train_head: with ``target_modules`` None, also give an
    untied output head rows of its own; a tied head always follows the embedding.
    """

    train_head: bool = field(
        default=False, metadata={"help": "Train rows of an untied output head too; a tied head always follows."}
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that stock PEFT knows; ``target_modules`` already includes ``train_head``."""
        known: dict[str, Any] = super().to_dict()
        for name in _OWN_FIELDS:
            del known[name]
        return known
