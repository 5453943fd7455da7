"""Defines the options of a patch and the opened inputs of a patch, for all artifact formats."""

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
from exporter.sources.hf.full_precision import require_convertible
from exporter.sources.hub.base_check import check_base
from exporter.sources.hub.locate import ADAPTERS_DIGEST, PREFIX, Located, locate, origins_after
from exporter.sources.peft.adapter import NO_ADAPTERS_DIGEST, Adapter, combined_digest
from exporter.verify import options

#: Hint in the error message for an OUT that is an input.
OVER_BASE: Final = "use --in-place to modify the base itself"
#: Values of ``--verify``. Each level includes all checks of the preceding levels.
LEVELS: Final = ("off", *options.LEVELS)
_DIGEST: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """User options of ``ttexport patch``.

    base: a .gguf file, or a folder with ONNX models. checkpoint: path or hub id of the checkpoint from which ``base``
    was made, or None to use the local base folder named in the adapters' configs. The checkpoint is needed to prove the
    origin of ``base``. trust_base: whether to patch without proving the origin of ``base``. dtype: dtype to which new
    rows are rounded before encoding (f32, f16 or bf16), or None for the dtype found in ``base``. level: verification
    level. The verification level "off" compares nothing. The verification level "rows" compares the new rows, the
    header or graph, and some rows of every tensor. The verification level "weights" compares every byte that must not
    differ from the base. The verification level "full" also runs the patched model and compares the output with the
    output of ``checkpoint`` plus unmerged adapters. Therefore, the verification level "full" needs a checkpoint even
    with ``trust_base``. quiet: whether to hide progress bars of downloads.
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
            raise UsageError("--report needs a verification and cannot be combined with --verify off")
        if self.in_place and self.out is not None:
            raise UsageError(f"--in-place modifies {self.base} itself and cannot be combined with -o {self.out}")
        if self.trust_base and self.checkpoint and self.level != "full":
            raise UsageError("--trust-base skips the comparison with the base and cannot be combined with --base")
        if self.trust_base and not self.checkpoint and self.level == "full":
            raise UsageError(
                "--verify full: expected --base CHECKPOINT in addition to --trust-base, because full verification "
                "compares the patched model with the base checkpoint"
            )
        if not self.adapters:
            raise UsageError("patch: expected an adapter after the base, found no adapter")


@dataclass(frozen=True)
class Inputs:
    """The opened adapters and the opened base checkpoint of a patch, with the paths or hub repositories of both.

    base: the base checkpoint, or None if the patch needs no base checkpoint. If a base checkpoint is given, a whole
    resized embedding in an adapter is reduced to the rows that resizing added. trusted: whether to patch the base
    artifact without a proof that the artifact was made from ``base``.
    """

    adapters: Sequence[Adapter]
    located: Sequence[Located]
    base: Checkpoint | None
    base_located: Located | None
    trusted: bool

    @classmethod
    def open(cls, spec: PatchSpec) -> Inputs:
        """Open the adapters and the base checkpoint, and read their headers.

        A whole resized embedding in an adapter is also read and compared with the base, to find the rows that resizing
        added.

        Raises BadInput, NotExpressible, UsageError.
        """
        located = [locate(word, asked_by="ADAPTER", content="adapter", quiet=spec.quiet) for word in spec.adapters]
        adapters = [Adapter.open(place.path) for place in located]
        base_located = _locate_base(spec, adapters)
        base = Checkpoint.open(base_located.path) if base_located else None
        if base_located is not None and base is not None:
            check_base(base_located, base, adapters, trust=spec.trust_base)
            if spec.level == "full":
                require_convertible(base, "--verify full")
            adapters = as_rows(base, adapters)
        return cls(adapters, located, base, base_located, spec.trust_base)

    @property
    def paths(self) -> set[Path]:
        """Paths of the folders and weight files of all adapters."""
        return {path for adapter in self.adapters for path in (adapter.path, adapter.weights)}

    def prove(self, compare: Callable[[Checkpoint], str]) -> str:
        """Prove that the base artifact was made from the base checkpoint. Returns a description of the proof.

        compare: function that compares the artifact with a checkpoint, and raises BadInput for a mismatch.
        """
        if self.trusted:
            return "trusted"
        assert self.base is not None, "without --trust-base, a base checkpoint is required"
        return compare(self.base)

    def provenance(self, recorded: Mapping[str, str]) -> dict[str, str]:
        """Return the provenance to record in the patched artifact. recorded: provenance of the base artifact.

        The digest of the adapters is recorded only if the base artifact contains an adapters' digest. Artifacts of
        other tools and of older ttexport versions contain no adapters' digest.
        """
        provenance = origins_after(recorded, None if self.trusted else self.base_located, self.located)
        if (before := recorded.get(ADAPTERS_DIGEST)) is not None and before != self._digest:
            provenance[ADAPTERS_DIGEST] = combined_digest(before, self.adapters)
        return provenance

    def note_on_adapters(self, path: Path, recorded: Mapping[str, str]) -> str:
        """Return a note for the user if adapters were already merged into the artifact, else an empty string.

        path: file of the artifact, for error messages.

        Raises BadInput if the artifact already contains rows of other adapters and the base is not trusted, because the
        rows of the other adapters would remain in the patched artifact. Raises BadInput if the adapters' digest
        recorded in the artifact is not a SHA-256 digest.
        """
        before = recorded.get(ADAPTERS_DIGEST, NO_ADAPTERS_DIGEST)
        if not _DIGEST.fullmatch(before):
            raise BadInput(f"{path}: {PREFIX}{ADAPTERS_DIGEST}: expected 64 hexadecimal digits, found {before!r:.80}")
        if before == NO_ADAPTERS_DIGEST:
            return ""
        if before == self._digest:
            return " (already patched with the same adapters)"
        if not self.trusted:
            raise BadInput(
                f"{path}: {PREFIX}{ADAPTERS_DIGEST}: expected an artifact without adapters or with the given adapters, "
                f"found other adapters ({before[:12]}), whose rows would remain; patch an artifact made from the base "
                "alone, or use --trust-base to keep the rows of the other adapters"
            )
        return " (rows of other adapters kept)"

    @cached_property
    def _digest(self) -> str:
        """The adapters' digest of an artifact into which exactly the given adapters are merged."""
        return combined_digest(NO_ADAPTERS_DIGEST, self.adapters)


def _locate_base(spec: PatchSpec, adapters: Sequence[Adapter]) -> Located | None:
    """Locate the base checkpoint: the value of ``--base``, or else the base folder that all adapters' configs name.

    Returns None if the base is trusted and ``--base`` is not given. Raises BadInput if no base checkpoint is found, or
    UsageError if no base checkpoint is found for ``--verify full``.
    """
    if spec.checkpoint is not None:
        return locate(spec.checkpoint, asked_by="--base", content="checkpoint", quiet=spec.quiet)
    if spec.trust_base:
        return None
    names = {adapter.base_name for adapter in adapters}
    name = names.pop() if len(names) == 1 else None
    if name is not None and Path(name).is_dir():
        return Located(Path(name))
    actual = f"the base {name!r}, which is not a folder" if name else "no base folder named by all adapters"
    if spec.level == "full":
        raise UsageError(
            f"--verify full: expected --base CHECKPOINT or a base folder named by the adapters, found {actual}"
        )
    raise BadInput(
        f"{spec.base}: expected --base CHECKPOINT to prove that the file was made from the adapters' base, found "
        f"{actual}; use --trust-base to skip the proof"
    )
