"""Making the artifact of a job: patched from the base's artifact where rows alone change, else merged and written.

Patching and merging give the same bytes, so it does not matter whether the base's artifact was there. It is converted
and quantised once, for all models and all releases that share a store. What several quantisations start from is an
entry of a store, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from exporter.errors import NotExpressible
from exporter.export.targets import plan_target
from exporter.formats.gguf import plan_gguf, write_gguf
from exporter.formats.gguf.quantisation.file_types import FILE_TYPES
from exporter.formats.gguf.quantisation.files import Intermediate
from exporter.formats.gguf.split import Split, split_file
from exporter.merge.plan import MergePlan
from exporter.patch import PatchPlan, PatchSpec, plan_patch, run_patch
from exporter.progress import Hooks, Progress, silent
from exporter.release.jobs import Job
from exporter.release.making.store import Store
from exporter.release.plan import ReleasePlan, wish_of

#: Formats whose artifacts ``ttexport patch`` takes.
PATCHABLE: Final = frozenset({"gguf", "onnx"})
#: What the artifact is called in an entry of a store.
_NAMES: Final = {"gguf": "model.gguf", "onnx": "model"}


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
        if job.format in PATCHABLE and model.rows_only:
            base, cached = self._base_artifact(job, progress)
            if patch := self._plan_patch(job, base, place):
                run_patch(patch, Hooks())
                self._split(job, place, progress)
                return "patched" if cached else "converted, patched"
        self._write(job, model.merge, self.own, place, progress)
        self._split(job, place, progress)
        return "merged"

    def _base_artifact(self, job: Job, progress: Progress) -> tuple[Path, bool]:
        """(the artifact of the base alone, whether it was there)."""
        base = self.plan.base

        def build(folder: Path) -> None:
            self._write(job, base, self.shared, folder / _NAMES[job.format], progress)

        content, cached = self.shared.get(self.plan.recipe(base, _unsplit(job)), build)
        return content / _NAMES[job.format], cached

    def _plan_patch(self, job: Job, base: Path, place: Path) -> PatchPlan | None:
        """None where a patch cannot say what the merge can: that hangs on the inputs alone."""
        adapters = self.plan.models[job.model].words
        try:
            # The recipe that names the file is the proof of its base.
            return plan_patch(
                PatchSpec(base=base, adapters=adapters, out=place, trust_base=True, level="off", quiet=True)
            )
        except NotExpressible:
            return None

    def _write(self, job: Job, merge: MergePlan, store: Store, place: Path, progress: Progress) -> None:
        """From ``merge`` by its format's own writer; ``store`` has, or gets, the file that quantisations start from."""
        wish = wish_of(self.plan.spec, job)
        if job.format == "gguf":
            stored = _stored(merge)
            if wish.quant in FILE_TYPES and (
                wish.quant != "Q8_0" or wish.token_embedding_type or wish.output_tensor_type
            ):
                wish.intermediates[None] = self._intermediate(job, merge, store, progress)
            elif wish.dtype == stored:
                wish = replace(wish, dtype=None)  # the same bytes, as raw ranges
        target = plan_target(job.format, wish, merge)
        if target.refusal:
            raise target.refusal
        assert target.write is not None, "there is no refusal"
        target.write(place, progress)

    def _intermediate(self, job: Job, merge: MergePlan, store: Store, progress: Progress) -> Intermediate:
        """The unquantised file; where a job makes the same one, it is that job's."""
        stored = _stored(merge)
        kept = {key: value for key, value in job.parameters.items() if key == "pre-tokenizer"}
        plain = replace(job, parameters={"dtype": stored.lower(), **kept} if stored else {"mixed": "F32", **kept})
        layout = plan_gguf(merge.model(), pre_tokenizer=kept.get("pre-tokenizer"), mixed="F32")
        name = _NAMES["gguf"]
        content, _ = store.get(
            self.plan.recipe(merge, plain), lambda folder: write_gguf(layout, folder / name, progress)
        )
        return Intermediate(layout, users=1, path=content / name)  # one user more than there are: it is kept

    def _split(self, job: Job, place: Path, progress: Progress) -> None:
        table = self.plan.spec.gguf
        if job.format == "gguf" and table and (split := Split.parse(table.split_max_size, table.split_max_tensors)):
            split_file(place, split, progress)


def _unsplit(job: Job) -> Job:
    """The job without what happens to the whole file afterwards."""
    kept = {key: value for key, value in job.parameters.items() if not key.startswith("split-")}
    return replace(job, parameters=kept)


def _stored(merge: MergePlan) -> str | None:
    """The dtype of all matrices of the base, if it is one."""
    kinds = {tensor.spec.dtype for tensor in merge.checkpoint.tensors.values() if len(tensor.spec.shape) > 1}
    return kinds.pop() if len(kinds) == 1 else None
