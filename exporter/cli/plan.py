"""``ttexport plan``."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import click

from exporter.cli.export import as_merge
from exporter.cli.options import base_option, export_options, export_spec, to_option
from exporter.cli.talk import size
from exporter.export import ExportPlan, plan_export, plan_json


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@base_option
@to_option
@export_options
def plan(sources: tuple[str, ...], base: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Show what merge or export would write from SOURCE with the same options; write nothing.

    Exit 5 if a target cannot be expressed.
    """
    paths = sources or (".",)
    inputs = as_merge(paths[0], base, quiet=quiet) if len(paths) == 1 else {"adapters": paths, "base": base}
    made = plan_export(export_spec(**inputs, quiet=quiet, **options))
    if as_json:
        click.echo(json.dumps(plan_json(made), indent=2))
    elif not quiet:
        _print(made)
    refusals = [target.refusal for target in made.targets if target.refusal]
    for refusal in refusals:
        print(f"ttexport: {refusal}", file=sys.stderr)
    if refusals:
        click.get_current_context().exit(refusals[0].exit_code)


def _print(made: ExportPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    targets = Table("target", "storage", "path", "size", "expressible", box=None, pad_edge=False)
    for entry in plan_json(made)["targets"]:
        answer = "yes" if entry["expressible"] else f"no: {entry['reason']}"
        targets.add_row(entry["format"], entry["storage"], entry["path"], size(entry["nbytes"]), answer)
    console.print(targets)
    for target in made.targets:
        for note in target.notes:
            console.print(f"{target.format}: {note}", markup=False)
    for key, value in made.merge.origins.items():
        console.print(f"{key}: {value}", markup=False)
    if made.merge.bookings:
        ledger = Table("adapter tensor", "rule", "into", box=None, pad_edge=False)
        for booking in made.merge.bookings:
            ledger.add_row(booking.key, booking.rule, ", ".join(booking.into) or "-")
        console.print()
        console.print(ledger)
    folder = made.out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    console.print(
        f"\nwrites {size(made.nbytes)}, free {size(shutil.disk_usage(folder).free)}, vocabulary {made.merge.vocab}"
    )
