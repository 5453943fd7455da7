"""Releases: many artifacts of many models from one description, verified, reproducible, vouched for.

``plan_release(read_spec(path), cache=Cache.of_user())`` finds and hashes the inputs and lays everything out;
``run_release(plan, out)`` makes, verifies and promotes it; ``assemble_release`` joins what ``run_release(…, only=job)``
made elsewhere; ``release_on_ray`` does both on a cluster. What they raise is listed with each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from exporter.release.assemble import assemble_release
    from exporter.release.jobs import find_job
    from exporter.release.on_ray import release_on_ray
    from exporter.release.plan import ReleasePlan, plan_release
    from exporter.release.run import run_release
    from exporter.release.spec import ReleaseSpec, read_spec
    from exporter.release.store import Cache

__all__ = [
    "Cache",
    "ReleasePlan",
    "ReleaseSpec",
    "assemble_release",
    "find_job",
    "plan_release",
    "read_spec",
    "release_on_ray",
    "run_release",
]

#: Imported when it is asked for: who checks a release needs nothing that makes one.
_HOMES: Final = {
    "Cache": "store",
    "ReleasePlan": "plan",
    "ReleaseSpec": "spec",
    "assemble_release": "assemble",
    "find_job": "jobs",
    "plan_release": "plan",
    "read_spec": "spec",
    "release_on_ray": "on_ray",
    "run_release": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
