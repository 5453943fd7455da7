"""Making the artifact of a job: patched from the base's artifact where rows alone change, else merged and written.

Patching and merging give the same bytes, so it does not matter whether the base's artifact was there. It is converted
and quantised once, for all models and all releases that share a store. The unquantised file that several quantisations
start from is an entry of a store, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.errors import NotExpressible
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.table import FORMATS, plan_target
from exporter.formats.target import FormatOptions
from exporter.merge.plan import MergePlan
from exporter.patch import PatchPlan, PatchSpec, plan_patch, run_patch
from exporter.progress import Hooks, Progress, silent
from exporter.release.jobs import Job
from exporter.release.making.store import Store
from exporter.release.plan import ReleasePlan


@dataclass
class Workshop:
    """Makes artifacts. shared: base artifacts, kept from run to run. own: what is of no use after this release."""

    plan: ReleasePlan
    shared: Store
    own: Store

    def make(self, job: Job, place: Path, progress: Progress = silent) -> str:
        """Write the artifact of ``job`` to ``place``, which does not exist; how it was made.

        Raises BadInput, NotExpressible, OutputError; nothing is left at ``place`` then.
        """
        model = self.plan.models[job.model]
        method = "merged"
        if FORMATS[job.format].patchable and model.rows_only:
            base, cached = self._base_artifact(job, progress)
            if patch := self._plan_patch(job, base, place):
                run_patch(patch, Hooks())
                method = "patched" if cached else "converted, patched"
        if method == "merged":
            self._write(job.options.whole(), model.merge, self.own, place, progress)
        if finish := self.plan.targets[job.name].finish:
            finish(place, progress)
        return method

    def _base_artifact(self, job: Job, progress: Progress) -> tuple[Path, bool]:
        """(the artifact of the base alone, whether it was there)."""
        base, options = self.plan.base, job.options.whole()
        name = _content_name(options)
        content, cached = self.shared.get(
            self.plan.recipe(base, options),
            lambda folder: self._write(options, base, self.shared, folder / name, progress),
        )
        return content / name, cached

    def _plan_patch(self, job: Job, base: Path, place: Path) -> PatchPlan | None:
        """None where a patch cannot do what the merge can, which depends on the inputs alone."""
        adapters = self.plan.models[job.model].words
        try:
            # The recipe that names the file is the proof of its base.
            return plan_patch(
                PatchSpec(base=base, adapters=adapters, out=place, trust_base=True, level="off", quiet=True)
            )
        except NotExpressible:
            return None

    def _write(self, options: FormatOptions, merge: MergePlan, store: Store, place: Path, progress: Progress) -> None:
        """From ``merge`` by its format's own writer. store: has, or gets, the file that quantisations start from."""
        if isinstance(options, GgufOptions) and options.storage == _stored(merge) and not options.quantisation:
            options = replace(options, types=(), dtype=None)  # the same bytes, as raw ranges
        target = plan_target(options, merge, self.plan.spec.merge.budget)
        target.make(place, progress, _StoreScratch(self.plan, merge, options, store))


@dataclass(frozen=True)
class _StoreScratch:
    """Unquantised files as entries of a store; where a job makes the same file, it is that job's."""

    plan: ReleasePlan
    merge: MergePlan
    options: FormatOptions
    store: Store

    def file(self, name: str, write: Callable[[Path], None]) -> tuple[Path, bool]:
        """See ``exporter.formats.target.Scratch``."""
        assert isinstance(self.options, GgufOptions), "only quantised GGUF files are made from another file"
        dtype = self.options.dtype or (_stored(self.merge) or "").lower()
        plain = GgufOptions(types=(dtype,) if dtype else (), pre_tokenizer=self.options.pre_tokenizer)
        more = {} if dtype else {"mixed": "F32"}
        content_name = _content_name(plain)
        content, was_there = self.store.get(
            self.plan.recipe(self.merge, plain, **more), lambda folder: write(folder / content_name)
        )
        return content / content_name, was_there


def _content_name(options: FormatOptions) -> str:
    """What an artifact is called in an entry of a store."""
    return "model.gguf" if FORMATS[options.section].is_file else "model"


def _stored(merge: MergePlan) -> str | None:
    """The dtype of all matrices of the base, if it is one."""
    kinds = {tensor.spec.dtype for tensor in merge.checkpoint.tensors.values() if len(tensor.spec.shape) > 1}
    return kinds.pop() if len(kinds) == 1 else None
