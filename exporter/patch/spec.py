"""What a patch is asked to do, and the inputs that it opens, whatever the format of its base."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, UsageError
from exporter.merge.vocabulary.whole_embedding import as_rows
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.locate import ADAPTERS_DIGEST, PREFIX, Located, locate, origins_after
from exporter.sources.peft.adapter import NO_ADAPTERS_DIGEST, Adapter, combined_digest
from exporter.verify import options

#: Hint for an OUT that is an input.
OVER_BASE: Final = "--in-place changes the base itself"
#: Values of ``--verify``; each level does all checks of those before it.
LEVELS: Final = ("off", *options.LEVELS)
_FULL: Final = "--verify full: runs the patched model against its base checkpoint"
_DIGEST: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """Options of one patch.

    base: a .gguf file, or a folder with ONNX models. checkpoint: the checkpoint that ``base`` was made from (path or
    hub id), as the proof of it; None: the folder that the adapters name. trust_base: patch without that proof.
    dtype: f32, f16 or bf16, to which rows are rounded first; None: as ``base`` shows.
    level: "off" compares nothing; "rows" the new rows, the header or graph, and some rows of every tensor; "weights"
    every byte that may not differ; "full" also runs the patched model against ``checkpoint`` with the adapters
    unmerged, so it needs a checkpoint even if ``trust_base`` skips the proof. quiet: no bars for downloads.
    """

    base: Path
    adapters: tuple[str, ...]
    out: Path | None = None
    in_place: bool = False
    checkpoint: str | None = None
    trust_base: bool = False
    dtype: str | None = None
    level: str = "rows"
    force: bool = False
    quiet: bool = False
    report: Path | None = None

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UsageError(f"--verify: expected {', '.join(LEVELS)}, found {self.level!r}")
        if self.report and self.level == "off":
            raise UsageError("--report: needs a verification, found --verify off")
        if self.in_place and self.out is not None:
            raise UsageError(f"--in-place: changes {self.base} itself, so there is no -o {self.out}")
        if self.trust_base and self.checkpoint and self.level != "full":
            raise UsageError("--trust-base: skips the proof, so there is no --base to compare with")
        if self.trust_base and not self.checkpoint and self.level == "full":
            raise UsageError(f"{_FULL}; expected --base CHECKPOINT beside --trust-base, found none")
        if not self.adapters:
            raise UsageError("patch: expected an adapter behind the base, found none")


@dataclass(frozen=True)
class Inputs:
    """The adapters and the base checkpoint, opened, and where they were found. base: None if none is needed.

    With a base, an adapter's whole resized embedding is replaced by the rows that it adds. trusted: the base artifact
    is patched without a proof that it was made from ``base``.
    """

    adapters: Sequence[Adapter]
    located: Sequence[Located]
    base: Checkpoint | None
    base_located: Located | None
    trusted: bool

    @classmethod
    def open(cls, spec: PatchSpec) -> Inputs:
        """Read headers, and a whole embedding beside an adapter's rows, to find the rows that it adds.

        Raises BadInput, NotExpressible, UsageError.
        """
        located = [locate(word, asked_by="ADAPTER", content="adapter", quiet=spec.quiet) for word in spec.adapters]
        adapters = [Adapter.open(place.path) for place in located]
        base_located = _locate_base(spec, adapters)
        base = Checkpoint.open(base_located.path) if base_located else None
        if base is not None:
            adapters = as_rows(base, adapters)
        return cls(adapters, located, base, base_located, spec.trust_base)

    @property
    def paths(self) -> set[Path]:
        """The adapters' folders and weight files."""
        return {path for adapter in self.adapters for path in (adapter.path, adapter.weights)}

    def prove(self, compare: Callable[[Checkpoint], str]) -> str:
        """How the base artifact proved to be made from the checkpoint, in words. compare: raises BadInput if not."""
        if self.trusted:
            return "trusted"
        assert self.base is not None, "a base that is not trusted was located"
        return compare(self.base)

    def provenance(self, recorded: Mapping[str, str]) -> dict[str, str]:
        """The provenance to record in the patched artifact. recorded: that of the base artifact, already checked.

        An artifact of another tool or of an older version has no place for the adapters' digest, and gets none.
        """
        provenance = origins_after(recorded, None if self.trusted else self.base_located, self.located)
        if (before := recorded.get(ADAPTERS_DIGEST)) is not None and before != self._digest:
            provenance[ADAPTERS_DIGEST] = combined_digest(before, self.adapters)
        return provenance

    def note_on_adapters(self, path: Path, recorded: Mapping[str, str]) -> str:
        """A note on the adapters that the artifact contains already. path: its file, for messages.

        Raises BadInput for other adapters than these, as their rows would stay, unless the base is trusted; and for a
        recorded value that is no digest.
        """
        before = recorded.get(ADAPTERS_DIGEST, NO_ADAPTERS_DIGEST)
        if not _DIGEST.fullmatch(before):
            raise BadInput(f"{path}: {PREFIX}{ADAPTERS_DIGEST}: expected 64 hexadecimal digits, found {before!r:.80}")
        if before == NO_ADAPTERS_DIGEST:
            return ""
        if before == self._digest:
            return ", patched with the same before"
        if not self.trusted:
            raise BadInput(
                f"{path}: {PREFIX}{ADAPTERS_DIGEST}: expected an artifact of the base alone, or with these adapters in "
                f"it, found {before[:12]}, other adapters: their rows would stay; patch the base's own artifact "
                "(--trust-base puts the rows beside theirs)"
            )
        return ", beside the rows of other adapters"

    @cached_property
    def _digest(self) -> str:
        """The digest of the base with these adapters."""
        return combined_digest(NO_ADAPTERS_DIGEST, self.adapters)


def _locate_base(spec: PatchSpec, adapters: Sequence[Adapter]) -> Located | None:
    """The base checkpoint: ``--base``, else the folder that the adapters name; None if none is needed.

    Raises BadInput if it is missing; for level full, UsageError.
    """
    if spec.checkpoint is not None:
        return locate(spec.checkpoint, asked_by="--base", content="checkpoint", quiet=spec.quiet)
    if spec.trust_base:
        return None
    names = {adapter.base_name for adapter in adapters}
    name = names.pop() if len(names) == 1 else None
    if name is not None and Path(name).is_dir():
        return Located(Path(name))
    actual = f"{name!r}, which is no folder here" if name else "no one folder that the adapters name"
    if spec.level == "full":
        raise UsageError(f"{_FULL}; expected --base CHECKPOINT, found {actual}")
    raise BadInput(
        f"{spec.base}: expected --base CHECKPOINT to prove that the file was made from the adapters' base, found "
        f"{actual}; --trust-base skips the proof"
    )
