"""Define the subcommand ``ttexport merge``."""

from __future__ import annotations

from typing import Any

import click

from exporter.cli import exporting
from exporter.cli.exporting import export_options


@click.command()
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@export_options
def merge(adapters: tuple[str, ...], **options: Any) -> None:
    """Merge adapters into their base and write the result.

    ADAPTER is a PEFT adapter: a folder or a hub id (user/name, user/name@revision). By default, ADAPTER is the current
    folder. Token rows of the adapters are written into the embedding and, if the LM head is tied to the embedding, into
    the LM head. Artifacts get their final names only after the artifacts have been verified on disk.

    \b
    Examples:
      ttexport merge --to onnx
      ttexport merge user/adapter@v1 --to gguf
      ttexport merge my-adapter --base my-base --to hf --to gguf -o out
      ttexport merge my-adapter --to gguf --quant Q8_0 --verify full
    """
    exporting.run(adapters=adapters or (".",), **options)
