"""Define the subcommand ``ttexport inspect``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import click

from exporter.cli.text import printable
from exporter.inspection import inspect_path
from exporter.sizes import format_size
from exporter.sources.hub.locate import locate


@click.command()
@click.argument("path", default=".")
@click.option("--json", "as_json", is_flag=True, help="Print the whole content as one JSON document.")
@click.option("--tensors", is_flag=True, help="List every tensor. By default, only the first tensors are listed.")
def inspect(path: str, as_json: bool, tensors: bool) -> None:
    """Show the content of PATH: an adapter, a checkpoint, a .gguf file or an ONNX folder. Only headers are read.

    For an ONNX folder, the names of all model files and the tensors of the first model file are listed. An adapter or a
    checkpoint may be a hub id (org/name, org/name@revision).
    """
    document = inspect_path(locate(path, asked_by="PATH"))
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _print(document, every=tensors)


def _print(document: Mapping[str, Any], *, every: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    facts = Table("", "", box=None, pad_edge=False, show_header=False)
    for key, value in document["facts"].items():
        facts.add_row(f"[bold]{escape(_text(key))}[/]", escape(_text(value)))
    console.print(facts)
    if models := document.get("models"):
        listed = Table("model", "precision", "size", box=None, pad_edge=False)
        for model in models:
            listed.add_row(escape(printable(model["file"])), model["precision"], format_size(model["nbytes"]))
        console.print()
        console.print(listed)
    shown = document["tensors"] if every else document["tensors"][:12]
    table = Table("tensor", "type", "shape", "size", box=None, pad_edge=False)
    for tensor in shown:
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        table.add_row(escape(printable(tensor["name"])), tensor["type"], shape, format_size(tensor["nbytes"]))
    console.print()
    console.print(table)
    if len(shown) < len(document["tensors"]):
        console.print(f"… and {len(document['tensors']) - len(shown)} more tensors (--tensors lists all tensors)")


def _text(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return printable(text if len(text) <= 300 else f"{text[:297]}…")
