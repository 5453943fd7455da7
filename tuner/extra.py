"""Check that the packages of the optional dependency group ``tune`` are installed."""

from __future__ import annotations

from exporter.packages import TENSORBOARD, TUNE


def require_extra(*, tensorboard: bool) -> None:
    """Raise MissingDependency if a package of the optional dependency group ``tune`` is not installed.

    No package is imported.
    """
    for package in (*TUNE, *((TENSORBOARD,) if tensorboard else ())):
        package.require("ttexport tune")
