"""Run the jobs of a release on a Ray cluster.

Each Ray task makes one piece on a free node; the calling process joins the pieces into the release. The pieces are
written to the staging folder of the release. All nodes must be able to access the staging folder and the inputs under
the same paths. Ray transports only the description of each job and any error that the job raises.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from exporter.errors import OutputError, TTExportError, UsageError, foreign_line
from exporter.io.apart import require_apart
from exporter.io.staging import require_space, resumable
from exporter.packages import RAY
from exporter.progress import Hooks
from exporter.release.facts import Release
from exporter.release.jobs import Job
from exporter.release.making.assemble import CollectedPieces
from exporter.release.making.finish import now, require_finish
from exporter.release.making.finished import finished_before, finished_release, require_same
from exporter.release.making.run import run_release
from exporter.release.making.store import Cache
from exporter.release.plan import FILE, ReleasePlan, plan_release
from exporter.release.spec import ReleaseSpec

#: CPUs per task. llama.cpp, ONNX Runtime and torch use all available CPUs, but a merge mostly waits for the disk.
CPUS: Final = 2
_PIECES: Final = "pieces"
#: Minimum size that Ray allows. Only errors pass through Ray's object store.
_STORE_NBYTES: Final = 100 << 20
#: Time that cancelled tasks have to end. A lost node never answers.
_CANCEL_SECONDS: Final = 30
_CONNECT_SECONDS: Final = 10


def release_on_ray(
    spec: ReleaseSpec,
    address: str,
    out: Path,
    hooks: Hooks | None = None,
    *,
    cache: Cache | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
    asked_by: Path = FILE,
) -> Release:
    """Make a release with one Ray task per job, and return the facts of the release.

    address: ``local`` starts Ray on this machine; any other value is passed to ``ray.init``. All nodes need the same
    version of ttexport. All nodes must be able to access ``out``, ``cache`` and the paths in ``spec`` under the same
    absolute paths. asked_by: name of the file that ``spec`` was read from, used in error messages. If a job fails, all
    other jobs are stopped and the error of the failed job is raised. Finished pieces are kept, so that a call with
    ``resume`` makes only the missing pieces. Raises MissingDependency if Ray is not installed, UsageError if
    ``address`` is invalid, OutputError if no Ray cluster answers at ``address``, TTExportError if a Ray task dies, and
    any error that a job raises.
    """
    ray, hooks, started = require_ray(), hooks or Hooks(), now()
    plan = plan_release(spec, cache=cache, quiet=quiet, asked_by=asked_by)
    require_apart(out, plan.inputs)
    keys, verifications = {job.name: plan.key(job) for job in plan.jobs}, plan.verifications(plan.jobs)
    find = partial(finished_release, out, plan.facts, keys, verifications)
    if resume and (finished := finished_before(out, find, hooks)):
        return finished
    require_finish(spec.signing)
    with resumable(out, force=force, resume=resume) as stage:
        if stage.promoted:
            return require_same(out, find())
        # Space for the pieces and for the copies of the pieces in the release. A resumed run has some of the pieces
        # already.
        require_space(out, plan.nbytes if resume else 2 * plan.nbytes)
        pieces = stage.folder.absolute() / _PIECES
        try:
            with _cluster(ray, address):
                _make_all(ray, plan, pieces, hooks)
        finally:
            stage.keep = pieces.is_dir() and any(pieces.iterdir())
        collected = CollectedPieces.open(spec, [pieces / job.slug for job in plan.jobs])
        return collected.join(stage, hooks, started)


def require_ray() -> Any:
    """Import the package ray. Raises MissingDependency."""
    try:
        import ray
    except ImportError as exc:
        raise RAY.missing("--ray") from exc
    return ray


@contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    settings: dict[str, Any] = {}
    if address == "local":
        cpus = max(
            CPUS, len(os.sched_getaffinity(0))
        )  # a task that requests more CPUs than the cluster has would wait forever
        settings = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE_NBYTES}
    try:
        _require_listener(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except ValueError as exc:
        raise UsageError(
            f"--ray {address}: expected local, auto, HOST:PORT or ray://HOST:PORT: {foreign_line(exc)}"
        ) from exc
    except (OSError, ImportError, RuntimeError) as exc:
        raise OutputError(
            f"--ray {address}", f"no Ray cluster can be reached at this address: {foreign_line(exc)}"
        ) from exc
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise OSError if no process listens at ``address``.

    At an address where no process listens, ``ray.init`` would retry for a quarter of an hour.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


def _make_all(ray: Any, plan: ReleasePlan, pieces: Path, hooks: Hooks) -> None:
    task = ray.remote(num_cpus=CPUS)(_make)
    waiting: dict[Any, Job] = {
        task.options(name=job.name).remote(plan.spec, job, pieces / job.slug, plan.cache): job for job in plan.jobs
    }
    meter = hooks.start("jobs", plan.nbytes)
    try:
        while waiting:
            (ref,), _ = ray.wait(list(waiting))
            job = waiting.pop(ref)
            _raise_error(ray, ref, job)
            meter(plan.targets[job.name].nbytes)
            hooks.say(f"made {job.name} ({len(plan.jobs) - len(waiting)} of {len(plan.jobs)})")
    finally:
        _cancel(ray, waiting)


def _make(spec: ReleaseSpec, job: Job, place: Path, cache: Cache | None) -> Exception | None:
    """Make or resume a piece in the folder ``place``, as a Ray task.

    Return the error that the job raised, or None if the piece was made. The task returns errors and does not raise
    errors, because Ray would wrap a raised error in its own class, with a traceback as message.
    """
    try:
        run_release(plan_release(spec, cache=cache), place, only=job, resume=True, force=True)
    except (TTExportError, OSError) as exc:
        return exc
    return None


def _raise_error(ray: Any, ref: Any, job: Job) -> None:
    try:
        error = ray.get(ref)
    except ray.exceptions.RayError as exc:
        raise TTExportError(f"{job.name}: the Ray task of this job failed: {foreign_line(exc, -1)}") from exc
    if error is not None:
        raise error


def _cancel(ray: Any, waiting: Mapping[Any, Job]) -> None:
    """Cancel running tasks.

    Cancel all Ray tasks, because no task may write into the staging folder after the lock on the folder is released.
    """
    for ref in waiting:
        ray.cancel(ref, force=True)
    if waiting:
        ray.wait(list(waiting), num_returns=len(waiting), timeout=_CANCEL_SECONDS)
