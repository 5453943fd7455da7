"""What a training run is told, checked as far as it can be without loading anything; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, UsageError

__all__ = ["DEFAULT_EPOCHS", "TuneSpec"]

DEFAULT_EPOCHS: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSpec:
    """A training run: ``base`` learns the rows of ``new_tokens`` and ``tokens`` from ``data``, into folder ``out``.

    base: checkpoint folder or hub id.  new_tokens: to be added.  tokens: known ones to be trained again.  special: new
    tokens are special tokens.  init: start of new rows (``tuner.vocab.INITS``).  descriptions: new token → text to
    start from instead.  steps, epochs: length of the run, at most one of them.  max_length: in tokens.  dtype: of the
    frozen base (f32, f16, bf16, auto); rows are float32 always.  train_head: None trains an untied head's rows too.
    """

    base: str
    data: Path
    out: Path
    new_tokens: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    special: bool = False
    init: str = "subtokens"
    descriptions: Mapping[str, str] = field(default_factory=dict)
    lr: float = 5e-3
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    max_length: int = 512
    seed: int = 0
    dtype: str = "f32"
    train_head: bool | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError or BadInput for a run that cannot be meant."""
        if not self.new_tokens and not self.tokens:
            raise BadInput("no token to train: expected at least one in new_tokens or tokens")
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs contradict each other: give one of them")
        for name in ("lr", "steps", "epochs", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')}: expected more than 0, found {value}")
