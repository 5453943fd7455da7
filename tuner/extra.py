"""The packages of the extra ``tune``."""

from __future__ import annotations

from exporter.packages import TENSORBOARD, TUNE


def require_extra(*, tensorboard: bool) -> None:
    """Raise MissingDependency unless the packages of the extra ``tune`` are installed; imports none of them."""
    for package in (*TUNE, *((TENSORBOARD,) if tensorboard else ())):
        package.require("ttexport tune")
