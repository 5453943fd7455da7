"""Define the subcommand ``ttexport release``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from exporter.cli.console import print_warnings, progress
from exporter.cli.options import PATH, output_options
from exporter.cli.verbs.release_push import check_push_options, push_options, push_release
from exporter.errors import OutputError
from exporter.release.facts import Release
from exporter.release.jobs import find_job, jobs_of, matrix
from exporter.release.making.assemble import assemble_release
from exporter.release.making.finished import recorded_jobs
from exporter.release.making.ray_cluster import release_on_ray
from exporter.release.making.run import run_release
from exporter.release.making.store import Cache
from exporter.release.plan import plan_release
from exporter.release.push import Pushed
from exporter.release.spec import read_spec
from exporter.release.tables import HubTable


@click.command()
@click.argument("toml", type=PATH, metavar="RELEASE.toml")
@click.option("-o", "--out", type=PATH, help="Folder to write; default: NAME-VERSION, or NAME-VERSION-JOB with --only.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run; finished jobs are not repeated.")
@click.option(
    "--only", metavar="JOB", help="Make and verify only the artifact of JOB. The output is a piece for --assemble."
)
@click.option("--matrix", "as_matrix", is_flag=True, help="Make nothing, and print the jobs as JSON for a CI matrix.")
@click.option(
    "--assemble",
    "pieces",
    type=PATH,
    multiple=True,
    metavar="DIR",
    help="Join finished pieces into the release. DIR is a piece made with --only, or a folder of pieces. Repeatable.",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Run each job as a two-CPU task on the Ray cluster at ADDRESS: local (this machine), auto, HOST:PORT or "
    "ray://HOST:PORT. All nodes must be able to access OUT and the inputs under the same paths.",
)
@click.option(
    "--cache", type=PATH, help="Folder for cached artifacts of the base; default: a folder in the user's cache folder."
)
@click.option("--no-cache", is_flag=True, help="Do not cache artifacts of the base.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace an existing OUT; without --resume, also discard the work of an interrupted run.",
)
@push_options
@output_options
def release(
    toml: Path,
    out: Path | None,
    only: str | None,
    as_matrix: bool,
    pieces: tuple[Path, ...],
    address: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Make and verify every artifact of RELEASE.toml (every model in every format) in one folder.

    \b
    A minimal RELEASE.toml (the README lists all keys):
      name = "Lamp"
      version = "1.0"
      base = "org/base@revision"
      models.keeper.adapters = ["adapter"]
      gguf.types = ["Q8_0"]

    OUT appears only after all artifacts are made and verified. Artifacts of the base are cached. If an adapter changes
    only token rows, its artifacts are made by writing the rows into copies of the cached artifacts. The same inputs
    give the same bytes, except for run.json and the signature.

    \b
    Examples:
      ttexport release release.toml
      ttexport release release.toml --resume
      ttexport release release.toml --only gguf-Q8_0 -o pieces/gguf-Q8_0
      ttexport release release.toml --assemble pieces
      ttexport release release.toml --ray auto
    """
    started = time.perf_counter()
    spec = read_spec(toml.absolute() if address else toml)
    jobs = jobs_of(spec)
    if sum((only is not None, as_matrix, bool(pieces), bool(address))) > 1:
        raise click.UsageError("--only, --matrix, --assemble and --ray are mutually exclusive")
    if as_matrix:
        click.echo(json.dumps(matrix(jobs)))
        return
    if options["cache"] and options["no_cache"]:
        raise click.UsageError("--cache and --no-cache are mutually exclusive")
    if only is not None and options["repo"]:
        raise click.UsageError("--push-to-hub uploads a whole release and cannot be combined with --only")
    job = find_job(jobs, only) if only is not None else None
    cache = None if pieces or options["no_cache"] else _cache(options["cache"], quiet=quiet)
    push = _push_settings(spec.hub or HubTable(), options)
    place = out or Path(f"{spec.name}-{spec.version}{f'-{job.slug}' if job else ''}")
    flags = {"resume": options["resume"], "force": options["force"]}
    with progress(quiet=quiet) as hooks:
        if pieces:
            made = assemble_release(spec, pieces, place, hooks, **flags)
        elif address:
            made = release_on_ray(spec, address, place, hooks, cache=cache, quiet=quiet, asked_by=toml, **flags)
        else:
            plan = plan_release(spec, cache=cache, quiet=quiet, asked_by=toml)
            print_warnings(warning for model in plan.models.values() for warning in model.merge.warnings)
            made = run_release(plan, place, hooks, only=job, **flags)
    pushed = push_release(place, quiet=quiet, **push)
    seconds = round(time.perf_counter() - started, 3)
    _print_result(made, pushed, place, seconds, as_json=as_json, quiet=quiet)


def _cache(folder: Path | None, *, quiet: bool) -> Cache | None:
    """Return the cache of base artifacts at ``folder``, or by default the user's cache.

    Returns None if the cache folder is not writable. Raises OutputError.
    """
    if folder:
        cache = Cache(folder.absolute())
        cache.require_writable()
        return cache
    try:
        cache = Cache.of_user()
        cache.require_writable()
    except OutputError as exc:
        if not quiet:
            print(f"the cache for artifacts of the base is disabled: {exc}", file=sys.stderr)
        return None
    return cache


def _push_settings(hub: HubTable, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the upload to the hub.

    If --push-to-hub is given, options missing from the command line are read from the table ``[hub]`` of release.toml.
    """
    given = {name: options[name] for name in ("repo", "revision", "message", "private", "dry_run")}
    check_push_options(**given)
    if given["repo"] is None:
        return given
    defaults = {"revision": hub.revision, "message": hub.message, "private": hub.private}
    return given | {name: given[name] or default for name, default in defaults.items()}


def _print_result(
    made: Release, pushed: Pushed | None, out: Path, seconds: float, *, as_json: bool, quiet: bool
) -> None:
    """Print the release folder or a JSON document to stdout, and one line for each artifact to stderr."""
    artifacts = [
        {
            "job": artifact.job,
            "format": artifact.format,
            "storage": artifact.storage,
            "path": str(out / artifact.path),
            "verification": artifact.report,
        }
        for artifact in made.artifacts
    ]
    if as_json:
        document = {
            "out": str(out),
            "name": made.name,
            "version": made.version,
            "artifacts": artifacts,
            "jobs": recorded_jobs(out),
            "pushed": pushed.to_json() if pushed else None,
            "seconds": seconds,
        }
        click.echo(json.dumps(document, indent=2))
        return
    if not quiet:
        for artifact in made.artifacts:
            verdict = f"equivalent ({len(artifact.report['checks'])} checks)" if artifact.report else "not verified"
            print(f"{artifact.path}: {artifact.format} {artifact.storage}, {verdict}", file=sys.stderr)
    click.echo(out)
