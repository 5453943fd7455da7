"""Define the subcommand ``ttexport converter install``."""

from __future__ import annotations

import click

from exporter.formats.gguf.converter.install import install_converter


@click.group()
def converter() -> None:
    """Install llama.cpp's converter, which writes the GGUFs of models that ttexport has no family for."""


@converter.command()
def install() -> None:
    """Download the converter of the installed llama-cpp-python from PyPI into the cache folder, and print its path.

    pip downloads the source distribution and checks its digest. No other verb uses the network for the converter.
    """
    click.echo(install_converter())
