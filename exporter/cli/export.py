"""``ttexport export``, also reached as ``ttexport --to …``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli import exporting
from exporter.cli.options import PATH, base_option, export_options, to_option
from exporter.sources.locate import is_adapter


@click.command()
@click.argument("source", default=Path(), type=PATH)
@base_option
@to_option
@export_options
def export(source: Path, base: str | None, **options: Any) -> None:
    """Write SOURCE, a checkpoint or an adapter folder (the current one by default), in another format.

    \b
    Examples:
      ttexport --to gguf
      ttexport --to onnx my-checkpoint -o my-checkpoint-onnx
    """
    exporting.run(**as_merge(source, base), **options)


def as_merge(source: Path, base: str | None) -> dict[str, Any]:
    """``adapters`` and ``base`` for a source of either kind."""
    if is_adapter(source):
        return {"adapters": (source,), "base": base}
    if base is not None:
        raise click.UsageError(f"--base is for adapters, and {source} is none")
    return {"adapters": (), "base": str(source)}
