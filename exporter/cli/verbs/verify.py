"""Define the subcommand ``ttexport verify``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from exporter.cli.console import print_reports, progress
from exporter.cli.options import PATH, group_options, output_options, spelled_as_flags
from exporter.cli.verbs.release_check import read_trust, trust_options, verify_release
from exporter.errors import UsageError
from exporter.release.check import is_release
from exporter.verify.options import LEVELS, VerifyOptions
from exporter.verify.report import document, require_passed, to_bytes
from exporter.verify.request import VerifyRequest, verify_request


@click.command()
@click.argument("artifact", type=PATH)
@click.option(
    "--reference", metavar="CHECKPOINT", help="Base of the adapters, as folder or hub id (org/name, org/name@revision)."
)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="ADAPTER", help="Adapter, as folder or hub id. Repeatable."
)
@click.option("--untie", is_flag=True, help="ARTIFACT was merged with --untie, so the LM head is a separate tensor.")
@click.option(
    "--drop-unused-tokens",
    "drop_unused",
    is_flag=True,
    help="ARTIFACT was merged with --drop-unused-tokens, so its tokenizer lacks tokens without an embedding row.",
)
@click.option(
    "--trust-base", is_flag=True, help="Verify even if an adapter records that it was trained on a different base."
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    help="rows: check the trained rows and the files beside the weights. weights: also check every weight. "
    "full (default): also run the models.",
)
@group_options(VerifyOptions, only=("--prompts", "--report", "--require"))
@trust_options
@output_options
def verify(
    artifact: Path,
    reference: str | None,
    adapters: tuple[str, ...],
    untie: bool,
    drop_unused: bool,
    trust_base: bool,
    level: str | None,
    prompts: Path | None,
    report: Path | None,
    require: tuple[str, ...],
    public_key: Path | None,
    identity: str | None,
    issuer: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Verify that ARTIFACT is equivalent to the base with unmerged adapters, or that a release is intact.

    ARTIFACT is a .gguf file, an ONNX or checkpoint folder, or the output folder of two or more formats. Each artifact
    is loaded from disk in a new process and run by a runtime of its format, such as llama.cpp. The outputs are compared
    with the reference: the base with unmerged adapters, run by transformers and PEFT. The exit code is 3 if ARTIFACT
    differs from the reference.

    Without --reference, ARTIFACT must be a release folder. Every file, tensor and document of a release folder is
    compared with the manifest, without network access. With --public-key, the signature of the release is also checked.
    The exit code is 3 if a file differs from the manifest, and 4 if the manifest cannot be read.
    """
    trust = read_trust(public_key, identity, issuer)
    if reference is None:
        if not is_release(artifact):
            raise UsageError(f"--reference is required, because {artifact} is not a release folder")
        if adapters or untie or drop_unused or trust_base or level or prompts or report or require:
            raise UsageError(
                "--adapter, --untie, --drop-unused-tokens, --trust-base, --level, --prompts, --report and --require "
                "require --reference"
            )
        verify_release(artifact, trust, as_json=as_json, quiet=quiet)
        return
    if trust:
        raise UsageError("--public-key and --identity check release folders and cannot be combined with --reference")
    if level == "rows" and not adapters:
        raise UsageError("--level rows requires --adapter; without an adapter, use --level weights")
    with spelled_as_flags():
        options = VerifyOptions(level=level or "full", prompts=prompts, report=report, require=require)
    request = VerifyRequest(
        artifact=artifact,
        reference=reference,
        adapters=adapters,
        untie=untie,
        drop_unused=drop_unused,
        trust_base=trust_base,
        options=options,
        quiet=quiet,
    )
    with progress(quiet=quiet) as hooks:
        reports = verify_request(request, hooks)
    if as_json and all(result.passed for result in reports):
        click.echo(to_bytes(document(reports)).decode(), nl=False)
    elif not quiet:
        print_reports(reports)
    require_passed(reports)
    if not (quiet or as_json):
        for result in reports:
            print(result.verdict(), file=sys.stderr)
