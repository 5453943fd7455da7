"""Define the subcommand ``ttexport plan``."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from exporter.cli.console import print_notes, print_warnings
from exporter.cli.options import (
    base_option,
    export_spec,
    format_groups,
    group_options,
    in_place_option,
    out_option,
    output_options,
    to_option,
)
from exporter.cli.verbs.export import as_merge
from exporter.cli.verbs.patch import patch
from exporter.export.run import plan_export
from exporter.export.spec import ExportPlan, MergeOptions
from exporter.merge.changes import LedgerEntry
from exporter.models.architecture import pattern_of
from exporter.patch import PatchSpec, is_patchable, patch_json, plan_patch
from exporter.sizes import format_size
from exporter.verify.options import VerifyOptions


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@base_option
@to_option
@out_option
@group_options(*format_groups())
@group_options(MergeOptions)
@group_options(VerifyOptions, only=("--verify", "--require"))
@in_place_option
@output_options
def plan(
    sources: tuple[str, ...],
    base: str | None,
    in_place: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Show what merge or export would write from SOURCE with the same options, without writing anything.

    If the first SOURCE is a .gguf file or a folder of ONNX models, show what patch would write. The exit code is 5 if a
    format cannot represent the model.
    """
    paths = sources or (".",)
    if is_patchable([Path(path) for path in paths]):
        _refuse_options_of_merge()
        _patch(paths, base, in_place=in_place, as_json=as_json, quiet=quiet, options=options)
        return
    if in_place:
        raise click.UsageError(
            f"--in-place: expected a .gguf file or a folder of ONNX models as the first SOURCE, found {paths[0]}"
        )
    if options["verify"]:
        raise click.UsageError(
            "--verify does not apply to the plan of a merge, because verification does not change this plan"
        )
    inputs = as_merge(paths[0], base, quiet=quiet) if len(paths) == 1 else {"adapters": paths, "base": base}
    made = plan_export(export_spec(**inputs, quiet=quiet, **options))
    print_notes(made.merge.adapters, quiet=quiet)
    print_warnings(made.merge.warnings)
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=2))
    elif not quiet:
        _print(made)
    refusals = [target.refusal for target in made.targets if target.refusal]
    for refusal in refusals:
        print(f"ttexport: {refusal}", file=sys.stderr)
    if refusals:
        click.get_current_context().exit(refusals[0].exit_code)


def _refuse_options_of_merge() -> None:
    """Raise UsageError for options that the subcommand ``patch`` does not have."""
    context = click.get_current_context()
    known = {parameter.name for parameter in patch.params} | {"base", "sources"}
    for parameter in plan.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in known:
            raise click.UsageError(
                f"{parameter.opts[0]} does not apply to a patch, because a patch keeps the format and the types of BASE"
            )


def _patch(
    paths: tuple[str, ...],
    base: str | None,
    *,
    in_place: bool,
    as_json: bool,
    quiet: bool,
    options: dict[str, Any],
) -> None:
    made = plan_patch(
        PatchSpec(
            base=Path(paths[0]),
            adapters=paths[1:],
            checkpoint=base,
            trust_base=options["trust_base"],
            in_place=in_place,
            out=options["out"],
            dtype=options["dtype"],
            level=options["verify"] or PatchSpec.level,
            quiet=quiet,
        )
    )
    print_notes(made.adapters, quiet=quiet)
    document = patch_json(made)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    elif not quiet:
        for entry in document["targets"]:
            click.echo(f"{entry['format']} {entry['storage']}  {entry['path']}  {format_size(entry['nbytes'])}")
        for entry in document["rows"]:
            rounded = f", rounded to {entry['dtype']}" if entry["dtype"] else ""
            click.echo(f"{entry['tensor']} ({entry['type']}): {len(entry['token_ids'])} rows{rounded}")
        for token_id, text in document["new_tokens"].items():
            click.echo(f"new token {token_id}: {text!r}")
        click.echo(
            f"vocabulary size: {document['vocab']}, check of the origin of BASE: {document['proof']}, "
            f"in place: {document['in_place']}"
        )


def _print(made: ExportPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    targets = Table("target", "storage", "path", "size", "memory", "expressible", box=None, pad_edge=False)
    for entry in made.to_json()["targets"]:
        answer = "yes" if entry["expressible"] else f"no: {entry['reason']}"
        sizes = ("", "")
        if entry["expressible"]:
            sizes = (format_size(entry["nbytes"]), f"{format_size(entry['peak_nbytes'])} at peak")
        targets.add_row(entry["format"], entry["storage"], entry["path"], *sizes, answer)
    console.print(targets)
    for target in made.targets:
        if target.maker:
            console.print(f"{target.format}: {target.maker}", markup=False)
        for note in target.notes:
            console.print(f"{target.format}: {note}", markup=False)
    for key, value in made.merge.origins.items():
        console.print(f"{key}: {value}", markup=False)
    if made.merge.ledger_entries:
        ledger = Table("adapter tensor", "tensors", "rule", "into", box=None, pad_edge=False)
        for (key, rule, into), count in _grouped(made.merge.ledger_entries).items():
            ledger.add_row(key, str(count), rule, into)
        console.print()
        console.print(ledger)
    folder = made.out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    console.print(
        f"\nwrites {format_size(made.nbytes)}, free {format_size(shutil.disk_usage(folder).free)}, "
        f"vocabulary {made.merge.vocab}"
    )


def _grouped(entries: Sequence[LedgerEntry]) -> dict[tuple[str, str, str], int]:
    """Return {(adapter tensor, merge rule, merged tensors): number of adapter tensors} with ``*`` for layer numbers.

    A large adapter has the same tensors in hundreds of layers, which would take a line each.
    """
    named = [(entry.key, entry.rule, ", ".join(entry.into) or "-") for entry in entries]
    patterns = [(pattern_of(key), rule, pattern_of(into)) for key, rule, into in named]
    counts = Counter(patterns)
    return {
        pattern if counts[pattern] > 1 else name: counts[pattern] for name, pattern in zip(named, patterns, strict=True)
    }
