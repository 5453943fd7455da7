"""Defines the configuration class of the tuner: PEFT's TrainableTokensConfig plus the option ``train_head``.

Saved configurations do not contain ``train_head``; instead, ``target_modules`` lists the head if it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import TrainableTokensConfig as PeftTrainableTokensConfig

__all__ = ["TrainableTokensConfig"]

# Fields that stock PEFT does not know. The effect of these fields is stored in PEFT's own fields before the build.
_OWN_FIELDS = ("train_head",)


@dataclass
class TrainableTokensConfig(PeftTrainableTokensConfig):
    """Configuration that lists the tokens whose rows are trained. Stock PEFT can read the saved configuration.

    token_indices: distinct token ids, which must be below the number of embedding rows. target_modules: names of the
    embeddings to train; None selects the input embedding. init_weights: True initialises the rows as copies of the
    base's rows, False initialises the rows at random. train_head: if ``target_modules`` is None, an untied output head
    also gets trained rows; a tied head always uses the rows of the embedding.
    """

    train_head: bool = field(
        default=False,
        metadata={
            "help": "Also train the tokens' rows in an untied output head; a tied head uses the embedding's rows."
        },
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dictionary with only the fields that stock PEFT knows.

        The field ``target_modules`` already includes the effect of ``train_head``.
        """
        known: dict[str, Any] = super().to_dict()
        for name in _OWN_FIELDS:
            del known[name]
        return known
