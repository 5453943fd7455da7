"""Make the artifact of a job, by patching an artifact of the base or by merging the adapters into the base.

An artifact of the base can be patched if the adapters change only token rows.

A patched artifact contains the same tensors as an artifact written after a merge. Patched and merged artifacts are
byte-identical if ttexport itself writes them, but may differ if llama.cpp's converter writes them. The
base is converted and quantised only once for all models of all releases that share a store. An unquantised file from
which several quantised files are made is also kept in a store, so that it is written once.
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
class ArtifactMaker:
    """Makes the artifacts of a release. base_store: store for artifacts of the base, kept between runs.

    scratch_store: store for temporary files of this release.
    """

    plan: ReleasePlan
    base_store: Store
    scratch_store: Store

    def make(self, job: Job, place: Path, progress: Progress = silent) -> str:
        """Write the artifact of ``job`` to ``place``, which must not exist yet, and return the name of the method used.

        Raises BadInput if an input is damaged, NotExpressible if the format cannot represent the model, and OutputError
        if writing fails. After an error, ``place`` does not exist.
        """
        model = self.plan.models[job.model]
        method = "merged"
        if FORMATS[job.format].patchable and model.rows_only:
            base, cached = self._base_artifact(job, progress)
            if patch := self._plan_patch(job, base, place):
                run_patch(patch, Hooks())
                method = "patched" if cached else "converted, patched"
        if method == "merged":
            self._write(job.options.whole(), model.merge, self.scratch_store, place, progress)
        if finish := self.plan.targets[job.name].finish:
            finish(place, progress)
        return method

    def _base_artifact(self, job: Job, progress: Progress) -> tuple[Path, bool]:
        """Return (path of the artifact made from the base without adapters, whether it was already in the cache)."""
        base, options = self.plan.base, job.options.whole()
        name = _content_name(options)
        content, cached = self.base_store.get(
            self.plan.recipe(base, options),
            lambda folder: self._write(options, base, self.base_store, folder / name, progress),
        )
        return content / name, cached

    def _plan_patch(self, job: Job, base: Path, place: Path) -> PatchPlan | None:
        """Return the plan for patching ``base``, or None if the adapters can only be merged.

        Whether ``base`` can be patched depends only on the base and the adapters.
        """
        adapters = self.plan.models[job.model].adapter_sources
        try:
            # The base needs no proof: the name of the store's entry is the digest of the recipe that made the base
            # artifact.
            return plan_patch(
                PatchSpec(base=base, adapters=adapters, out=place, trust_base=True, level="off", quiet=True)
            )
        except NotExpressible:
            return None

    def _write(self, options: FormatOptions, merge: MergePlan, store: Store, place: Path, progress: Progress) -> None:
        """Merge as planned in ``merge``, and write the merged model to ``place`` in the format of ``options``.

        store: store for the unquantised file from which quantised files are made.
        """
        if isinstance(options, GgufOptions) and not options.types and options.storage == _stored(merge):
            options = replace(options, dtype=None)  # the same bytes, copied as raw ranges
        target = plan_target(options, merge, self.plan.spec.merge.budget)
        target.make(place, progress, _StoreScratch(self.plan, merge, options, store))


@dataclass(frozen=True)
class _StoreScratch:
    """Writes the unquantised files, from which quantised files are made, into a store.

    Several jobs that quantise the same unquantised file use the same stored file.
    """

    plan: ReleasePlan
    merge: MergePlan
    options: FormatOptions
    store: Store

    def file(self, name: str, write: Callable[[Path], None]) -> tuple[Path, bool]:
        """See ``exporter.formats.target.Scratch``."""
        assert isinstance(self.options, GgufOptions), "only quantised GGUF files are made from an unquantised file"
        dtype = self.options.dtype or (_stored(self.merge) or "").lower() or None
        plain = self.options.unquantised(dtype)
        more = {} if dtype else {"mixed": "F32"}
        content_name = _content_name(plain)
        content, cached = self.store.get(
            self.plan.recipe(self.merge, plain, **more), lambda folder: write(folder / content_name)
        )
        return content / content_name, cached


def _content_name(options: FormatOptions) -> str:
    """Return the file or folder name that an artifact has inside a store."""
    return "model.gguf" if FORMATS[options.section].is_file else "model"


def _stored(merge: MergePlan) -> str | None:
    """Return the dtype of the base's matrices if all matrices have the same dtype, else None."""
    dtypes = {tensor.spec.dtype for tensor in merge.checkpoint.tensors.values() if len(tensor.spec.shape) > 1}
    return dtypes.pop() if len(dtypes) == 1 else None
