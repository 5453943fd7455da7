"""Run a release: make the artifact of each job in a staging folder, verify each model, then publish with one rename.

The run writes a line to a journal for every finished job and for every verified model. A run with ``resume`` skips
every job and every verification for which the journal has a valid line.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from exporter.errors import NotEquivalent, writing
from exporter.export.inputs import reference_of
from exporter.formats.table import FORMATS
from exporter.io.apart import require_apart
from exporter.io.digests import FileDigests, files_below
from exporter.io.staging import Stage, require_space, resumable, sync_folder, write_file
from exporter.progress import Hooks
from exporter.release.facts import Artifact, Release
from exporter.release.jobs import Job
from exporter.release.making.finish import finish, now, require_finish, run_facts
from exporter.release.making.finished import finished_before, finished_piece, finished_release, require_same
from exporter.release.making.journal import Journal, Made, Verified
from exporter.release.making.make import ArtifactMaker
from exporter.release.making.piece import write_piece
from exporter.release.making.store import Store
from exporter.release.plan import ReleasePlan
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Report, document, to_bytes
from exporter.verify.reports.write import write_report
from exporter.verify.run import verify

_JOURNAL: Final = "journal.jsonl"
_WORK: Final = "work"
_STORE: Final = "store"
#: The report of a failed verification, written into the staging folder.
_FAILED: Final = "report.json"


@dataclass
class ReleaseRun:
    """One run of a release. jobs: the jobs to run, which can be all jobs of the release or a single job."""

    plan: ReleasePlan
    jobs: Sequence[Job]
    stage: Stage
    hooks: Hooks
    journal: Journal
    maker: ArtifactMaker
    digests: FileDigests
    started: str = field(default_factory=now)

    def work(self) -> None:
        """Make every missing artifact and verify every model that is not verified yet."""
        for model in dict.fromkeys(job.model for job in self.jobs):
            jobs = [job for job in self.jobs if job.model == model]
            for job in jobs:
                if job.name not in self.journal.made:
                    self._make(job)
            self._verify(model, jobs)

    def _make(self, job: Job) -> None:
        target = self.plan.targets[job.name]
        work = self.stage.folder / _WORK
        self.hooks.say(f"making {job.name}")
        started = time.perf_counter()
        place = work / self.plan.place(job)
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        method = self.maker.make(job, place, self.hooks.start(job.name, target.work_nbytes or target.nbytes))
        seconds = time.perf_counter() - started
        names = [path.relative_to(work) for path in files_below(work)]
        digests = self.digests.of_all(work / name for name in names)
        with writing(self.stage.draft):
            for name in names:
                (self.stage.draft / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).rename(self.stage.draft / name)
            for folder in {self.stage.draft / name.parent for name in names}:
                sync_folder(folder)
        files = {name.as_posix(): digests[work / name] for name in names}
        line = Made(job=job.name, key=self.plan.key(job), files=files, seconds=round(seconds, 4), method=method)
        self.journal.add(line)
        self.stage.keep = True

    def _verify(self, model: str, jobs: Sequence[Job]) -> None:
        keys = {job.name: self.journal.made[job.name].key for job in jobs}
        verified, verification = self.journal.verified.get(model), self.plan.verifications(jobs).get(model)
        if verification is None or (verified and verified.keys == keys):
            return
        started = time.perf_counter()
        reference = reference_of(self.plan.models[model].merge, untie=self.plan.spec.merge.untie)
        paths = [self.stage.draft / self.main_path(job) for job in jobs]
        drafted = verify(
            paths,
            reference,
            level=self.plan.spec.verify.level,
            prompts=self.plan.prompts,
            required=self.plan.spec.verify.require,
            say=self.hooks.say,
        )
        places = [path.relative_to(self.stage.draft) for path in paths]
        reports = [replace(report, artifact=place) for report, place in zip(drafted, places, strict=True)]
        self._write_report(model, reports, reference, paths)
        self._require_passed(jobs, reports)
        entries = {job.name: report.to_json() for job, report in zip(jobs, reports, strict=True)}
        seconds = round(time.perf_counter() - started, 4)
        self.journal.add(Verified(model=model, verification=verification, keys=keys, reports=entries, seconds=seconds))

    def _write_report(self, model: str, reports: Sequence[Report], reference: Reference, paths: Sequence[Path]) -> None:
        """Write the report of a passed or failed verification to the folder given by the option ``verify.report``.

        If the release has two or more models, the report of each model is written to a subfolder named after the model.
        """
        folder = self.plan.spec.verify.report
        if folder is None:
            return
        from exporter.verify.reports.setting import setting  # this module lists installed packages, which takes time

        place = folder / model if len(self.plan.models) > 1 else folder
        write_report(place, reports, setting(reference, paths))

    def _require_passed(self, jobs: Sequence[Job], reports: Sequence[Report]) -> None:
        """Raise NotEquivalent for the first job whose artifact failed the verification.

        After a failed verification, the reports are kept in the staging folder.
        """
        for job, report in zip(jobs, reports, strict=True):
            if not report.passed:
                place = self.stage.folder / _FAILED
                place.unlink(missing_ok=True)
                write_file(place, to_bytes(document(reports)))
                raise NotEquivalent(
                    f"{job.name}: {report.verdict()}; no release was published; for details, see {place}",
                    document(reports),
                )

    def main_path(self, job: Job) -> str:
        """Return the artifact's path (for a split file, the path of the first part), relative to the release."""
        return min(self.journal.made[job.name].files) if FORMATS[job.format].is_file else self.plan.place(job)

    def artifacts(self) -> list[Artifact]:
        """Return the facts about each artifact, including its verification report."""
        reports = {job: report for line in self.journal.verified.values() for job, report in line.reports.items()}
        return [
            Artifact(
                job=job.name,
                model=job.model,
                format=job.format,
                storage=self.plan.targets[job.name].storage,
                path=self.main_path(job),
                parameters=job.parameters,
                report=reports.get(job.name),
                notes=tuple(self.plan.targets[job.name].notes),
            )
            for job in self.jobs
        ]


def run_release(
    plan: ReleasePlan,
    out: Path,
    hooks: Hooks | None = None,
    *,
    only: Job | None = None,
    resume: bool = False,
    force: bool = False,
) -> Release:
    """Make, verify and publish a release at ``out``, and return the facts of the release.

    only: a single job; the result at ``out`` is then a piece (the artifact of the job) and not a release. resume:
    continue an interrupted run. force: replace ``out``; without ``resume``, also discard the work of an interrupted
    run. Raises NotEquivalent if an artifact fails the verification. Raises OutputError if ``out`` exists already or
    cannot be written, and BadInput if an input is damaged. After an error, ``out`` is unchanged, and ``resume`` can
    continue the run.
    """
    require_apart(out, plan.inputs)
    hooks = hooks or Hooks()
    jobs = [only] if only else list(plan.jobs)
    keys, verifications = {job.name: plan.key(job) for job in jobs}, plan.verifications(jobs)
    find = partial(finished_piece if only else finished_release, out, plan.facts, keys, verifications)
    if resume and (finished := finished_before(out, find, hooks)):
        return finished
    if not only:
        require_finish(plan.spec.signing)
    with resumable(out, force=force, resume=resume) as stage:
        if stage.promoted:
            return require_same(out, find())
        _clear(stage.folder / _WORK)
        digests = FileDigests()  # no cache: artifacts are hashed again, even if an earlier process recorded digests
        journal = Journal.open(stage.folder / _JOURNAL, stage.draft, keys, verifications, digests)
        scratch = Store(stage.folder / _STORE, digests)
        maker = ArtifactMaker(plan, Store(plan.cache.artifacts, digests) if plan.cache else scratch, scratch)
        run = ReleaseRun(plan, jobs, stage, hooks, journal, maker, digests)
        require_space(out, sum(plan.targets[job.name].nbytes for job in jobs if job.name not in journal.made))
        run.work()
        release = replace(plan.facts, artifacts=tuple(run.artifacts()))
        if only:
            write_piece(stage.draft, release, journal.made[only.name], journal.verified.get(only.model))
        else:
            seconds = {model: line.seconds for model, line in journal.verified.items()}
            facts = run_facts(run.started, journal.made, seconds, verifications)
            finish(stage.draft, release, facts, plan.spec.signing)
    return release


def _clear(folder: Path) -> None:
    with writing(folder):
        if folder.exists():
            shutil.rmtree(folder)
