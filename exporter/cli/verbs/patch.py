"""Define the subcommand ``ttexport patch``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from exporter.cli.console import print_notes, print_reports, progress
from exporter.cli.options import PATH, in_place_option, output_options
from exporter.formats.target import DTYPES
from exporter.patch import LEVELS, PatchSpec, patch_json, plan_patch, restore, run_patch
from exporter.sizes import format_size
from exporter.verify.report import Report


@click.command()
@click.argument("base", type=PATH, metavar="BASE")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "-o", "--out", type=PATH, help="File or folder to write; if BASE is a split GGUF, path of the first part."
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Dtype to which new rows are rounded before encoding (GGUF only); default: the dtype found in BASE.",
)
@click.option(
    "--verify",
    "verify",
    type=click.Choice(LEVELS),
    default="rows",
    show_default=True,
    help="off: verify nothing. rows: check the written rows, the GGUF header or ONNX graph, and some unchanged rows of "
    "every tensor. weights: also check that all unchanged bytes equal the bytes of BASE. full: also run the patched "
    "model, and compare its outputs with the outputs of the unmerged adapters in transformers and PEFT; needs the base "
    "checkpoint.",
)
@click.option("--report", type=PATH, help="Folder for report.json, report.xml (JUnit) and report.html.")
@click.option("--force", is_flag=True, help="Replace an existing OUT.")
@click.option(
    "--base", "checkpoint", metavar="CHECKPOINT", help="Checkpoint (folder or hub id) from which BASE was made."
)
@click.option("--trust-base", is_flag=True, help="Skip the check that BASE was made from the base of the adapters.")
@in_place_option
@output_options
def patch(base: Path, as_json: bool, quiet: bool, verbose: bool, verify: str, **options: Any) -> None:
    """Write an adapter's token rows into BASE, a .gguf file or a folder of ONNX models.

    BASE may have any model architecture and any quantisation type, and may have been written by any tool. In a folder
    of ONNX models, every model is patched, and the tokenizer files and configs are updated.

    The row of a new token is written to an unused row of the vocabulary. When no unused rows are left, the vocabulary
    grows. A patched file has the same bytes as a file made by merging, converting and quantising. By default, a patched
    copy of BASE is written; with --in-place, BASE itself is modified.

    BASE must have been made from the checkpoint that the adapters were trained on. The option --base names
    that checkpoint (default: the folder named in the adapters). If ttexport made BASE, the digest of the checkpoint is
    compared with the digest in BASE; otherwise, rows of the checkpoint are compared with rows of BASE.

    \b
    Examples:
      ttexport patch model-Q4_K_M.gguf my-adapter -o tuned-Q4_K_M.gguf
      ttexport patch model-Q8_0.gguf my-adapter --in-place --trust-base
      ttexport patch onnx-folder my-adapter -o tuned-onnx
    """
    started = time.perf_counter()
    spec = PatchSpec(base=base, level=verify, quiet=quiet, **options)
    if not spec.in_place and spec.out is None:
        raise click.UsageError("patch: expected -o OUT or --in-place")
    if spec.in_place and restore(base) and not quiet:
        print(f"{base}: an interrupted patch was undone", file=sys.stderr)
    plan = plan_patch(spec)
    print_notes(plan.adapters, quiet=quiet)
    with progress(quiet=quiet) as hooks:
        report = run_patch(plan, hooks)
    document = patch_json(plan)
    if as_json:
        artifacts = [{**target, "verification": report.to_json() if report else None} for target in document["targets"]]
        seconds = round(time.perf_counter() - started, 3)
        click.echo(json.dumps({**document, "artifacts": artifacts, "seconds": seconds}, indent=2))
        return
    if not quiet:
        if report and report.level == "full":
            print_reports([report])
        rows = sum(len(entry["token_ids"]) for entry in plan.row_table)
        print(
            f"{plan.format} {plan.storage}: {rows} rows of {format_size(plan.nbytes)}, "
            f"{len(plan.new_tokens)} new tokens, base: {plan.proof}, {_verdict(report)}",
            file=sys.stderr,
        )
    for target in plan.targets:
        click.echo(target["path"])


def _verdict(report: Report | None) -> str:
    if report is None:
        return "not verified"
    return f"{'equivalent' if report.level == 'full' else 'verified on disk'} ({len(report.checks)} checks)"
