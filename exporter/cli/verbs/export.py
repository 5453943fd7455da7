"""Define the subcommand ``ttexport export``, which also runs for ``ttexport --to …`` without a subcommand."""

from __future__ import annotations

from typing import Any

import click

from exporter.cli import exporting
from exporter.cli.exporting import export_options
from exporter.sources.hub.locate import is_adapter, locate


@click.command()
@click.argument("source", default=".")
@export_options
def export(source: str, base: str | None, quiet: bool, **options: Any) -> None:
    """Write SOURCE, a checkpoint or an adapter, in another format.

    SOURCE is a folder or a hub id (org/name, org/name@revision). By default, SOURCE is the current folder.

    \b
    Examples:
      ttexport --to gguf
      ttexport --to onnx my-checkpoint -o my-checkpoint-onnx
    """
    exporting.run(**as_merge(source, base, quiet=quiet), quiet=quiet, **options)


def as_merge(source: str, base: str | None, *, quiet: bool) -> dict[str, Any]:
    """Return the merge arguments ``adapters`` and ``base`` that export ``source``, an adapter or a checkpoint."""
    if is_adapter(locate(source, asked_by="SOURCE", quiet=quiet).path):
        return {"adapters": (source,), "base": base}
    if base is not None:
        raise click.UsageError(f"--base requires an adapter as SOURCE, but {source} is not an adapter")
    return {"adapters": (), "base": source}
