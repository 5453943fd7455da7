"""The command ``tune``: parse, build a specification, call. Importing this module does not import torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from exporter.errors import TTExportError, UsageError
from tuner.data import read_texts
from tuner.spec import DEFAULT_EPOCHS, TuneSpec

__all__ = ["main", "tune"]


@click.command(name="tune", short_help="Teach a model a few tokens; writes an adapter folder.")
@click.argument("base")
@click.option("--data", required=True, type=click.Path(path_type=Path), help='JSON Lines of {"text": "…"}.')
@click.option("--new-token", "new_tokens", multiple=True, metavar="T", help="A token to add. Repeatable.")
@click.option("--token", "tokens", multiple=True, metavar="T", help="A known token to train again. Repeatable.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Adapter folder to write.")
@click.option("--special/--no-special", default=False, help="New tokens are special tokens (skipped in clean text).")
@click.option(
    "--init",
    type=click.Choice(["subtokens", "mean", "zeros", "sample"]),
    default="subtokens",
    show_default=True,
    help="Start of new rows: mean of the token's pieces, mean of all rows, zeros, or drawn like the other rows.",
)
@click.option("--describe", multiple=True, metavar="T=TEXT", help="Start new token T from the mean of TEXT's tokens.")
@click.option("--lr", type=float, default=5e-3, show_default=True, help="Learning rate of AdamW, falling to 0.")
@click.option("--steps", type=int, help="Length of the run in batches.")
@click.option("--epochs", type=float, help=f"Length of the run in passes over the data; {DEFAULT_EPOCHS:g} by default.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Texts in a batch.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Longer texts are cut, in tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same machine: same rows.")
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16", "auto"]),
    default="f32",
    show_default=True,
    help="Type of the frozen base in memory; auto keeps what is stored. Rows are float32.",
)
@click.option("--train-head/--no-train-head", default=None, help="Rows in an untied head too; on by default.")
@click.option("--force", is_flag=True, help="Replace an existing adapter folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the record of the run as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no notes.")
@click.option("-v", "--verbose", is_flag=True, expose_value=False, help="Show where an unexpected error arose.")
def tune(*, describe: Sequence[str], as_json: bool, quiet: bool, **options: Any) -> None:
    """Teach the model BASE (a checkpoint folder or hub id) a few tokens.

    Only the rows of these tokens are trained; a weight-tied output head follows them. The result is an adapter folder
    that stock PEFT loads and `ttexport merge` turns into artifacts.
    """
    if not options["new_tokens"] and not options["tokens"]:
        raise UsageError("no token to train: give --new-token or --token at least once")
    spec = TuneSpec(descriptions=_descriptions(describe), **options)
    texts = read_texts(spec.data)  # before the imports that take seconds
    from tuner.train import tune as run

    with _progress(quiet) as (on_step, on_note):
        record = run(spec, texts, on_step=on_step, on_note=on_note)
    if as_json:
        click.echo(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        click.echo(record["adapter"])


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
    """Yield the callbacks for steps and notes: a bar and lines on stderr, or nothing."""
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
        progress.start()  # only now, so that bad input is answered by its one line alone
        progress.update(task, completed=step, total=steps, loss=f"{loss:.4f}")

    def on_note(note: str) -> None:
        console.print(f"ttexport: {note}", markup=False, highlight=False, soft_wrap=True)

    try:
        yield on_step, on_note
    finally:
        if progress.live.is_started:
            progress.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command alone (``python -m tuner``) and return its exit code; errors are one line on stderr."""
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
