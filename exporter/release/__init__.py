"""Make verified, reproducible and optionally signed artifacts of one or more models from one ``release.toml``.

``plan_release(read_spec(path), cache=Cache.of_user())`` locates and hashes the inputs and plans every artifact.
``run_release(plan, out)`` makes, verifies and publishes the release. A piece is a folder with the artifact of a single
job; ``run_release(…, only=job)`` makes a piece. ``assemble_release`` joins pieces that were made on different machines
into a release. ``release_on_ray`` makes the pieces on a Ray cluster and joins them into a release. The docstring of
each function lists the errors that the function raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.lazy import lazy_attributes

if TYPE_CHECKING:
    from exporter.release.jobs import find_job
    from exporter.release.making.assemble import assemble_release
    from exporter.release.making.ray_cluster import release_on_ray
    from exporter.release.making.run import run_release
    from exporter.release.making.store import Cache
    from exporter.release.plan import ReleasePlan, plan_release
    from exporter.release.spec import ReleaseSpec, read_spec

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

__getattr__ = lazy_attributes(
    __name__,
    {
        "Cache": "exporter.release.making.store",
        "ReleasePlan": "exporter.release.plan",
        "ReleaseSpec": "exporter.release.spec",
        "assemble_release": "exporter.release.making.assemble",
        "find_job": "exporter.release.jobs",
        "plan_release": "exporter.release.plan",
        "read_spec": "exporter.release.spec",
        "release_on_ray": "exporter.release.making.ray_cluster",
        "run_release": "exporter.release.making.run",
    },
)
