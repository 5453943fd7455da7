"""Define and check the options of a training run.

The checks in this module need neither the model nor the data. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, UsageError

__all__ = ["DEFAULTS", "DEFAULT_EPOCHS", "DTYPES", "INITS", "SCHEDULES", "TuneSpec"]

DEFAULT_EPOCHS: Final = 3.0

# Initial row of a new token. A description, if given, replaces the token's own sub-tokens.
INITS: Final = ("subtokens", "mean", "zeros", "sample")

# Dtypes of the frozen base in memory. "auto" keeps the dtype in the checkpoint.
DTYPES: Final = ("f32", "f16", "bf16", "auto")

# Name in ttexport → name in transformers. Every schedule starts with the warm-up.
SCHEDULES: Final[Mapping[str, str]] = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}

_POSITIVE: Final = (
    "lr", "steps", "epochs", "batch_size", "accumulate", "max_length", "eval_every", "patience", "save_every",
    "lora_rank",
)  # fmt: skip

_CHOICES: Final[Mapping[str, Collection[str]]] = {"init": INITS, "schedule": SCHEDULES, "dtype": DTYPES}

# Paths and flags that do not change the resulting rows. The contents of files are compared by digest.
_NOT_IN_SETTINGS: Final = ("base", "data", "out", "eval_data", "tensorboard", "force", "resume", "save_every")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSpec:
    """The options of a training run, which trains the rows of ``new_tokens`` and ``tokens`` in ``base`` on ``data``.

    out: output folder. base: checkpoint folder or hub id. new_tokens: tokens to add. tokens: existing tokens whose rows
    are trained. special: whether to add new tokens as special tokens. init: method for the initial rows of new tokens,
    an element of ``INITS``. descriptions: maps a new token to a descriptive text; the token's initial row is the mean
    of the rows of the text's tokens, and ``init`` is ignored. steps, epochs: length of the run, given in at most one of
    the two units. batch_size: examples per process and batch. accumulate: batches per step. max_length: maximum number
    of tokens per example. warmup: fraction of the steps used for warm-up, in [0, 1). dtype: dtype of the frozen base,
    an element of ``DTYPES``; the trained rows are always float32. bf16: compute in bfloat16 (autocast).
    gradient_checkpointing: recompute activations in the backward pass to save memory. train_head: whether to train rows
    of an untied head; None means yes. lora_rank, lora_targets: rank and modules of a LoRA adapter that is trained in
    addition to the rows; without modules, PEFT's default for the architecture is used. eval_data, eval_share: examples
    for evaluation, as a file or as a fraction of ``data``. eval_every: steps between evaluations; None means one
    evaluation per epoch. patience: number of consecutive evaluations without a lower loss after which the run stops;
    the rows with the lowest loss are kept. save_every: steps between checkpoints. resume: continue from the last
    checkpoint. tensorboard: folder for the event files of TensorBoard.
    """

    base: str
    data: Path
    out: Path
    new_tokens: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    special: bool = False
    init: str = "subtokens"
    descriptions: Mapping[str, str] = field(default_factory=dict)
    lr: float = 1e-2
    schedule: str = "cosine"
    warmup: float = 0.1
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 512
    seed: int = 0
    dtype: str = "f32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    train_head: bool | None = None
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = ()
    eval_data: Path | None = None
    eval_share: float | None = None
    eval_every: int | None = None
    patience: int | None = None
    save_every: int | None = None
    resume: bool = False
    tensorboard: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError if options contradict each other or are out of range, and BadInput if no token is given."""
        if not self.new_tokens and not self.tokens:
            raise BadInput("expected at least one token to train (--new-token or --token), found no token")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{_option(name)}: expected a finite number greater than 0, found {value}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"--warmup: expected a fraction in [0, 1), found {self.warmup}")
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise UsageError(f"--eval-share: expected a fraction in (0, 1), found {self.eval_share}")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UsageError(f"{_option(name)}: expected {' or '.join(choices)}, found {value!r}")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs are mutually exclusive")
        if self.eval_data is not None and self.eval_share is not None:
            raise UsageError("--eval-data and --eval-share are mutually exclusive")
        for name in ("eval_every", "patience"):
            if getattr(self, name) is not None and not self.evaluates:
                raise UsageError(
                    f"{_option(name)}: expected evaluation examples, found no examples; use --eval-data or --eval-share"
                )
        if self.lora_targets and self.lora_rank is None:
            raise UsageError("--lora-targets: expected the option --lora-rank too, found only --lora-targets")
        # The best rows come from a checkpoint, so every checkpoint of a run with patience must have been evaluated.
        evaluated = (
            self.eval_every is not None and self.save_every is not None and not self.save_every % self.eval_every
        )
        if self.patience is not None and self.save_every is not None and not evaluated:
            raise UsageError(
                f"--save-every: expected a multiple of --eval-every if --patience is given, found {self.save_every}"
            )

    @property
    def evaluates(self) -> bool:
        """Whether the run has examples for evaluation."""
        return self.eval_data is not None or self.eval_share is not None

    @property
    def saves(self) -> bool:
        """Whether the run writes checkpoints, because of ``save_every`` or ``patience``.

        With ``patience``, the rows with the lowest loss are loaded from a checkpoint.
        """
        return self.save_every is not None or self.patience is not None

    def settings(self) -> dict[str, Any]:
        """Return the options that determine the trained rows, as JSON values.

        Two runs with equal settings and equal input files train equal rows.
        """
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in _NOT_IN_SETTINGS}
        return {
            name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
        }


# Field → default value, for the fields that have a default value.
DEFAULTS: Final[Mapping[str, Any]] = {
    entry.name: entry.default for entry in fields(TuneSpec) if entry.default is not MISSING
}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
