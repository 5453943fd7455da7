"""The packages of the extra ``tune``."""

from __future__ import annotations

from importlib.util import find_spec

from exporter.errors import MissingDependency


def require_extra(*, tensorboard: bool) -> None:
    """Raise MissingDependency unless the packages of the extra ``tune`` are there; imports none of them."""
    for package in ("trl", "datasets", "accelerate", "matplotlib", *(("tensorboardX",) if tensorboard else ())):
        if find_spec(package) is None:
            raise MissingDependency(package, needed_for="ttexport tune", install="ttexport[tune]")
