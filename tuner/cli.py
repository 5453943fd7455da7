"""Define the command ``tune``, which parses the arguments, builds a TuneSpec and runs the training.

Importing this module does not import torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from exporter.errors import TTExportError, UsageError
from tuner.extra import require_extra
from tuner.inputs.data import read_examples
from tuner.spec import DEFAULT_EPOCHS, DEFAULTS, DTYPES, INITS, SCHEDULES, TuneSpec
from tuner.training.work import is_first_process

__all__ = ["main", "tune"]


_FILE = click.Path(path_type=Path)


@click.command(
    name="tune", short_help="Train the embedding rows of a few tokens of a model, and write an adapter folder."
)
@click.argument("base")
@click.option(
    "--data",
    required=True,
    type=_FILE,
    help="JSON Lines file with training examples: texts, prompts with completions, or chats.",
)
@click.option(
    "--new-token",
    "new_tokens",
    multiple=True,
    metavar="T",
    help="New token to add to the vocabulary and train. Repeatable.",
)
@click.option(
    "--token",
    "tokens",
    multiple=True,
    metavar="T",
    help="Token of the vocabulary whose embedding row is trained. Repeatable.",
)
@click.option("-o", "--out", required=True, type=_FILE, help="Adapter folder to write.")
@click.option(
    "--special/--no-special",
    default=False,
    help="Add new tokens as special tokens, which decoding with skip_special_tokens omits.",
)
@click.option(
    "--init",
    type=click.Choice(INITS),
    default=DEFAULTS["init"],
    show_default=True,
    help="Initial row of a new token: mean of the rows of the tokens into which the base tokenizer splits the new "
    "token, mean of all rows, zeros, or a random row with the mean and covariance of all rows.",
)
@click.option(
    "--describe",
    multiple=True,
    metavar="T=TEXT",
    help="Initialise the row of new token T with the mean of the rows of TEXT's tokens. Repeatable.",
)
@click.option("--lr", type=float, default=DEFAULTS["lr"], show_default=True, help="Peak learning rate of AdamW.")
@click.option(
    "--schedule",
    type=click.Choice(list(SCHEDULES)),
    default=DEFAULTS["schedule"],
    show_default=True,
    help="Learning-rate schedule after the warm-up.",
)
@click.option(
    "--warmup",
    type=float,
    default=DEFAULTS["warmup"],
    show_default=True,
    help="Fraction of the steps used for warm-up.",
)
@click.option("--steps", type=int, help="Number of training steps.")
@click.option(
    "--epochs", type=float, help=f"Number of training epochs; default: {DEFAULT_EPOCHS:g}, unless --steps is given."
)
@click.option(
    "--batch-size", type=int, default=DEFAULTS["batch_size"], show_default=True, help="Examples per batch and process."
)
@click.option(
    "--accumulate",
    type=int,
    default=DEFAULTS["accumulate"],
    show_default=True,
    help="Number of batches whose gradients are accumulated per training step.",
)
@click.option(
    "--max-length",
    type=int,
    default=DEFAULTS["max_length"],
    show_default=True,
    help="Maximum number of tokens per example; longer examples are truncated.",
)
@click.option(
    "--seed",
    type=int,
    default=DEFAULTS["seed"],
    show_default=True,
    help="Random seed; two runs with equal seeds, options and inputs train equal rows.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=DEFAULTS["dtype"],
    show_default=True,
    help="Dtype of the frozen base in memory; auto keeps the stored dtype. The trained rows are always float32.",
)
@click.option("--bf16", is_flag=True, help="Compute in bfloat16 (autocast).")
@click.option(
    "--gradient-checkpointing", is_flag=True, help="Recompute activations in the backward pass to save memory."
)
@click.option(
    "--train-head/--no-train-head", default=None, help="Also train the tokens' rows in an untied output head (default)."
)
@click.option("--lora-rank", type=int, help="Train a LoRA adapter of the given rank in addition to the token rows.")
@click.option(
    "--lora-targets",
    metavar="NAMES",
    help="Comma-separated names of the modules that get LoRA weights, or all-linear. Without this option, PEFT chooses "
    "modules that suit the model type.",
)
@click.option(
    "--eval-data", type=_FILE, help="JSON Lines file with examples for evaluation before, during and after training."
)
@click.option("--eval-share", type=float, help="Fraction of the data to hold out for evaluation.")
@click.option("--eval-every", type=int, metavar="N", help="Evaluate every N steps; once per epoch by default.")
@click.option(
    "--patience",
    type=int,
    metavar="N",
    help="Stop after N consecutive evaluations without a lower loss, and keep the rows with the lowest loss.",
)
@click.option("--save-every", type=int, metavar="N", help="Write a checkpoint every N steps.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an interrupted run from the last checkpoint. The result equals that of an uninterrupted run.",
)
@click.option("--tensorboard", type=_FILE, metavar="DIR", help="Write event files for TensorBoard to DIR.")
@click.option("--force", is_flag=True, help="Replace an existing adapter folder, and discard an unfinished run.")
@click.option("--json", "as_json", is_flag=True, help="Print the tokens, losses and settings of the run as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress bars and no notes.")
@click.option("-v", "--verbose", is_flag=True, expose_value=False, help="Show the traceback of an unexpected error.")
def tune(*, describe: Sequence[str], lora_targets: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Train the embedding rows of a few tokens of the model BASE.

    BASE is a checkpoint folder or a hub id (org/name or org/name@revision). All other weights of BASE are frozen. A
    weight-tied output head uses the trained rows too. The result is an adapter folder. Stock PEFT can load the adapter,
    and `ttexport merge` merges the adapter into the base and writes artifacts.

    Each line of the --data file is a JSON object: {"text": …} to learn the whole text, {"prompt": …, "completion": …}
    to learn the completion, or {"messages": […]} to learn the assistant's turns. To train in two or more processes, run
    `torchrun -m tuner …` or `accelerate launch -m tuner …` with the same arguments.
    """
    targets = tuple(name.strip() for name in (lora_targets or "").split(",") if name.strip())
    spec = TuneSpec(descriptions=_descriptions(describe), lora_targets=targets, **options)
    examples = read_examples(spec.data)  # the data is read before imports that take seconds
    require_extra(tensorboard=spec.tensorboard is not None)
    from tuner.training.train import tune as run

    with _progress(quiet or not is_first_process()) as (on_step, on_note):
        record = run(spec, examples, on_step=on_step, on_note=on_note)
    _leave_group()
    if not is_first_process():
        return
    if as_json:
        click.echo(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        click.echo(record["adapter"])


def _leave_group() -> None:
    """Destroy torch's process group, if a process group exists.

    Threads of gloo (the communication library for CPUs) may still use the last tensors after a collective operation
    returns. If a process exits without destroying the process group, the process sometimes aborts, because a gloo
    thread can no longer acquire the interpreter's lock (GIL).
    """
    from accelerate import PartialState

    PartialState().destroy_process_group()


def _descriptions(pairs: Sequence[str]) -> dict[str, str]:
    descriptions: dict[str, str] = {}
    for pair in pairs:
        token, equals, text = pair.partition("=")
        if not (token and equals and text):
            raise UsageError(f"--describe: expected T=TEXT, found {pair!r}")
        descriptions[token] = text
    return descriptions


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[Any, Any]]:
    """Yield the two callbacks that report training steps and notes to the user.

    The first callback draws a progress bar on stderr, and the second prints each note as a line. With ``quiet``, both
    callbacks are None.
    """
    if quiet:
        yield None, None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console)
    task = progress.add_task("training", total=None, loss="-")

    def on_step(step: int, steps: int, loss: float) -> None:
        progress.start()  # the bar starts with the first step, so that for bad input only the error line is printed
        progress.update(task, completed=step, total=steps, loss=f"{loss:.4f}")

    def on_note(note: str) -> None:
        console.print(f"ttexport: {note}", markup=False, highlight=False, soft_wrap=True)

    try:
        yield on_step, on_note
    finally:
        if progress.live.is_started:
            progress.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``python -m tuner`` and return the exit code. An error is printed as one line on stderr."""
    try:
        tune.main(args=None if arguments is None else list(arguments), prog_name="tuner", standalone_mode=False)
    except TTExportError as exc:
        click.echo(f"ttexport: {exc}", err=True)
        return exc.exit_code
    except click.ClickException as exc:
        exc.show(sys.stderr)
        return exc.exit_code
    except click.Abort:
        click.echo("ttexport: interrupted", err=True)
        return 130
    return 0
