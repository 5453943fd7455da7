"""A release whose jobs run on a Ray cluster: each makes its piece where a node is free, and here they are joined.

Pieces lie in the staging folder of the release, which all nodes therefore see under the same name, as they do the
inputs; Ray itself carries nothing but the description of a job and its error.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from exporter.errors import OutputError, TTExportError, UsageError
from exporter.io.apart import require_apart
from exporter.io.staging import has_leftover, require_space, resumable
from exporter.packages import RAY
from exporter.progress import Hooks
from exporter.release.facts import Release
from exporter.release.jobs import Job
from exporter.release.making.assemble import Parts
from exporter.release.making.finish import now, require_finish
from exporter.release.making.finished import finished_release, require_same
from exporter.release.making.run import run_release
from exporter.release.making.store import Cache
from exporter.release.plan import FILE, ReleasePlan, plan_release
from exporter.release.spec import ReleaseSpec

#: CPUs that each job asks for: llama.cpp, ONNX Runtime and torch use what they get, and a merge waits for its disk.
CPUS: Final = 2
_PIECES: Final = "pieces"
#: Ray's least; errors are all that passes through it.
_STORE_NBYTES: Final = 100 << 20
#: For jobs that are told to end because another one failed; a node that is gone does not answer.
_FAREWELL_SECONDS: Final = 30
_KNOCK_SECONDS: Final = 10


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
    """As ``run_release``, with a Ray task for each job; its facts.

    address: ``local`` starts Ray on this machine; anything else is what ``ray.init`` joins. All nodes have this version
    of ttexport and see ``out``, ``cache`` and the paths of ``spec``, all absolute, under the same names.
    asked_by: as ``plan_release`` has it.
    The first job that fails ends the release, with its own error; pieces that are finished stay for ``resume``.
    Raises MissingDependency without Ray, UsageError for an ``address`` that is none, OutputError where no cluster
    answers, TTExportError for a task that dies.
    """
    ray, hooks, started = require(), hooks or Hooks(), now()
    plan = plan_release(spec, cache=cache, quiet=quiet, asked_by=asked_by)
    require_apart(out, plan.inputs)
    keys, verifications = {job.name: plan.key(job) for job in plan.jobs}, plan.verifications(plan.jobs)
    if resume and not has_leftover(out) and (found := finished_release(out, plan.facts, keys, verifications)):
        hooks.say(f"{out}: finished before")
        return found
    require_finish(spec.signing)
    with resumable(out, force=force, resume=resume) as stage:
        if stage.promoted:
            return require_same(out, finished_release(out, plan.facts, keys, verifications))
        # The pieces, of which some may be there, and their copies in the release.
        require_space(out, plan.nbytes if resume else 2 * plan.nbytes)
        pieces = stage.folder.absolute() / _PIECES
        try:
            with _cluster(ray, address):
                _make_all(ray, plan, pieces, hooks)
        finally:
            stage.keep = pieces.is_dir() and any(pieces.iterdir())
        parts = Parts.open(spec, [pieces / job.slug for job in plan.jobs])
        return parts.join(stage, hooks, started)


def require() -> Any:
    """The package ray. Raises MissingDependency."""
    try:
        import ray
    except ImportError as exc:
        raise RAY.missing("--ray") from exc
    return ray


@contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    own: dict[str, Any] = {}
    if address == "local":
        cpus = max(CPUS, len(os.sched_getaffinity(0)))  # a job that asks for more than there is waits for ever
        own = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE_NBYTES}
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except ValueError as exc:
        raise UsageError(f"--ray {address}: expected local, auto, HOST:PORT or ray://HOST:PORT: {exc}") from exc
    except (OSError, ImportError, RuntimeError) as exc:
        raise OutputError(f"--ray {address}", f"expected a Ray cluster, found none that answers: {exc}") from exc
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nobody listens: Ray would go on asking for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()


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
        _end(ray, waiting)


def _make(spec: ReleaseSpec, job: Job, place: Path, cache: Cache | None) -> Exception | None:
    """The task: make a piece at ``place``, or go on with it; what went wrong.

    Errors are returned, not raised: Ray would hand out classes of its own, with a traceback for a message.
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
        reason = str(exc).strip().splitlines()[-1]
        raise TTExportError(f"{job.name}: expected its Ray task to end well, found {reason}") from exc
    if error is not None:
        raise error


def _end(ray: Any, waiting: Mapping[Any, Job]) -> None:
    """Nobody writes into a staging folder that is about to be let go."""
    for ref in waiting:
        ray.cancel(ref, force=True)
    if waiting:
        ray.wait(list(waiting), num_returns=len(waiting), timeout=_FAREWELL_SECONDS)
