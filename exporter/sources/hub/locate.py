"""Resolves an input, given as a path or as a hub id, to a file or folder on disk.

A hub id has the form ``org/name`` or ``org/name@revision``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import BadInput
from exporter.sources.hf.checkpoint import CONFIG as CHECKPOINT_CONFIG
from exporter.sources.hf.full_precision import full_precision_name
from exporter.sources.hub.fetch import RepoContent, fetch
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.folders import CONFIG, named_adapters

#: Pattern of an id on the hub. A name on the hub has at most 96 characters.
_ID: Final = re.compile(r"(?P<repo>(?:\w[\w.-]{,95}/)?\w[\w.-]{,95})(?:@(?P<revision>.+))?", re.ASCII)
#: Pattern of the usual names of branches, tags and commits in git. ``..`` is also refused, because the cache uses the
#: revision in a path.
_REVISION: Final = re.compile(r"\w[\w./+-]{,254}", re.ASCII)
_DEFAULT_REVISION: Final = "main"
#: Prefix of an artifact's metadata keys for provenance.
PREFIX: Final = "ttexport."
#: Metadata key for the ``combined_digest`` of the merged adapters.
ADAPTERS_DIGEST: Final = "adapters.sha256"
_RECORDED: Final = re.compile(r"adapter\.(?P<number>\d+)\.(?P<field>repo|revision)")


@dataclass(frozen=True, slots=True)
class Located:
    """An input file or folder on disk.

    The fields ``repo`` and ``revision`` (the commit) are set only if the input comes from the hub.
    """

    path: Path
    repo: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """Display name of the input: the name of the hub repository without the owner, or the name of the folder."""
        return self.repo.split("/")[-1] if self.repo else self.path.resolve().name


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is the folder of an adapter, or a folder of adapters that is not itself a model."""
    if os.path.lexists(path / CONFIG):
        return True
    return path.is_dir() and not (path / CHECKPOINT_CONFIG).exists() and bool(named_adapters(path))


def find_base(named: str | None, adapters: Sequence[Adapter], *, quiet: bool = False) -> Located:
    """Find the base checkpoint: ``named`` if given, else the base that all adapter configs name.

    Raises BadInput if neither ``named`` nor an adapter names a base, if the adapters name different bases, or if the
    base cannot be found or downloaded.
    """
    if named is not None:
        return locate(named, asked_by="--base", content="checkpoint", quiet=quiet)
    where = adapters[0].path / CONFIG
    distinct = {(adapter.base_name, _base_revision(adapter)) for adapter in adapters}
    if {name for name, _ in distinct} == {None}:
        raise BadInput(
            f"{where}: base_model_name_or_path: expected a path or a hub id, found no value; "
            "use --base to give the base"
        )
    if len(distinct) > 1:
        actual = ", ".join(sorted(f"{name}@{revision}" if revision else str(name) for name, revision in distinct))
        raise BadInput(
            f"{where}: base_model_name_or_path: expected one base for all adapters, found the bases {actual}"
        )
    ((name, revision),) = distinct
    asked_by = f"{where}: base_model_name_or_path"
    try:
        return locate(str(name), asked_by=asked_by, content="checkpoint", revision=revision, quiet=quiet)
    except BadInput as exc:
        before = full_precision_name({}, [str(name)])
        if before is None:
            raise
        raise BadInput(
            f"{exc}; {name} seems to be a quantised checkpoint; use --base to give the unquantised checkpoint {before}"
        ) from exc


def _base_revision(adapter: Adapter) -> str | None:
    """Return the revision of the base that adapter_config.json records.

    Returns None for the default branch of the repository.
    """
    revision = adapter.config.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise BadInput(f"{adapter.path / CONFIG}: revision: expected a branch, tag or commit, found {revision!r:.80}")
    return None if revision == _DEFAULT_REVISION else revision or None


def locate(
    word: str, *, asked_by: str, content: RepoContent | None = None, revision: str | None = None, quiet: bool = False
) -> Located:
    """Find the file or folder that ``word`` refers to: an existing path or else a repository id on the hub.

    A hub repository is read from the cache or downloaded. content: "adapter" or "checkpoint" if ``word`` must be the
    one or the other, or None if both are allowed. revision: the revision to use if ``word`` contains no revision.
    asked_by: the option or file that contains ``word``, for error messages. Raises BadInput.
    """
    path = Path(word)
    try:
        if path.exists():
            return Located(path)
    except OSError as exc:  # a name that is too long, or a folder without permission
        raise BadInput(f"{asked_by}: expected a path or a hub id, found {word!r:.80} ({exc.strerror or exc})") from exc
    match = _ID.fullmatch(word)
    # Only old checkpoints such as gpt2 have no owner. In all other cases a single word is a folder that does not exist.
    if match is None or ("/" not in match["repo"] and content != "checkpoint"):
        raise BadInput(f"{asked_by}: expected a path or a hub id, found {word!r:.80}, which does not exist")
    wanted = match["revision"] or revision or _DEFAULT_REVISION
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        raise BadInput(f"{asked_by}: {match['repo']}: expected a branch, tag or commit, found {wanted!r:.80}")
    try:
        folder = fetch(match["repo"], wanted, content=content, quiet=quiet)
    except BadInput as exc:
        raise BadInput(f"{asked_by}: {exc}") from exc
    return Located(folder, match["repo"], folder.name)


def origins_after(recorded: Mapping[str, str], base: Located | None, adapters: Sequence[Located]) -> dict[str, str]:
    """Return the provenance (hub ids and commits) to record after a patch has merged more adapters into an artifact.

    recorded: the artifact's provenance before the patch. All entries of ``recorded`` are kept. The new adapters are
    numbered in the order of ``adapters``, and the first number follows the highest number in ``recorded``. An adapter
    whose repository and commit are recorded already is not recorded again.
    """
    known = [match["number"] for key in recorded if (match := _RECORDED.fullmatch(key))]
    present = {(recorded.get(f"adapter.{number}.repo"), recorded.get(f"adapter.{number}.revision")) for number in known}
    first = 1 + max(map(int, known), default=-1)
    added = [adapter for adapter in adapters if (adapter.repo, adapter.revision) not in present]
    new = origins(base or Located(Path()), added)
    return {**recorded, **{_renumbered(key, first): value for key, value in new.items()}}


def _renumbered(key: str, first: int) -> str:
    match = _RECORDED.fullmatch(key)
    return f"adapter.{int(match['number']) + first}.{match['field']}" if match else key


def origins(base: Located, adapters: Sequence[Located]) -> dict[str, str]:
    """Map keys such as ``base.repo`` and ``adapter.0.revision`` to the hub ids and commits of the inputs.

    Local paths of inputs are not recorded, because the bytes of an artifact must not depend on the machine that writes
    the artifact, and a local path is meaningless on another machine.
    """
    named = {"base": base} | {f"adapter.{number}": adapter for number, adapter in enumerate(adapters)}
    return {
        f"{key}.{field}": value
        for key, located in named.items()
        for field, value in (("repo", located.repo), ("revision", located.revision))
        if value
    }
