"""A repository of the Hugging Face hub as a folder: from the local cache if it is whole there, else downloaded.

Only data is fetched (configs, tokenizer files, chat templates, the safetensors that will be read): never a pickle,
never code. The cache is huggingface_hub's own, so a download is shared with every other tool; a folder in it is named
by the commit that it holds. huggingface_hub keeps the listing of each commit that it downloaded, with sizes: that is
how a cache that somebody filled in part is told from a whole one.
"""

from __future__ import annotations

import glob
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal

from exporter.errors import BadInput, OutputError
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import (
    ADDITIONAL_TEMPLATES,
    AUXILIARY_FILES,
    CONFIG,
    INDEX,
    MAX_INDEX_BYTES,
    VOCABULARIES,
    WEIGHTS,
)
from exporter.sources.peft.adapter import CONFIG as ADAPTER_CONFIG
from exporter.sources.peft.adapter import WEIGHTS as ADAPTER_WEIGHTS

RepoContent = Literal["adapter", "checkpoint"]

#: Read before it is known which weights are needed; all of it is small.
_SMALL: Final = (CONFIG, INDEX, ADAPTER_CONFIG, *AUXILIARY_FILES, ADDITIONAL_TEMPLATES)
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt")


def fetch(repo: str, revision: str, *, content: RepoContent | None, quiet: bool) -> Path:
    """The folder of ``repo`` at ``revision`` (branch, tag or commit), whole; its name is the commit.

    What is whole in the cache is used without asking the hub. ``content`` says which weights to fetch; None: an
    adapter's if the repository is one, else a checkpoint's.
    Raises BadInput with what is missing and what to do, OutputError if the cache cannot be written.
    """
    from huggingface_hub import constants

    held = _in_cache(repo, revision)
    gap = _gap(repo, held, content) if held else None
    if held and not gap and _listing(repo, held) is not None:
        return held
    quiet = quiet or constants.HF_HUB_OFFLINE  # nothing will be downloaded
    try:
        with _no_warnings():
            folder = _download(repo, revision, content, bars=_bars(f"downloading {repo}@{revision}", quiet=quiet))
    except Exception as exc:  # the errors of hub, network and cache share no base class
        if held and not gap:
            return held  # nobody says that anything is missing
        if isinstance(exc, OSError) and exc.errno:
            raise OutputError(exc.filename or _cache(), f"the hub's cache: {exc.strerror}") from exc
        state = f"{gap} in" if gap else "neither a folder nor in"
        raise BadInput(f"{repo}@{revision}: {state} the local cache, and {_reason(repo, revision, exc)}") from exc
    if gap := _gap(repo, folder, content):
        raise BadInput(f"{repo}@{revision}: {gap}{_found_instead(repo, folder)}")
    return folder


def _in_cache(repo: str, revision: str) -> Path | None:
    """The folder of the commit that the cache holds for ``revision``, whole or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # no pattern, so nothing to be missing: completeness is judged here, where it is known what is needed
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _download(repo: str, revision: str, content: RepoContent | None, *, bars: Any) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    # snapshot_download would hide a refusal behind a folder that is there in part; this one speaks up.
    HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(_SMALL), tqdm_class=bars))
    weights = _weights(folder, _listing(repo, folder), content or _kind_of(folder))
    # The commit, not the branch: it must not move between config and weights.
    exact = [glob.escape(name) for name in weights]
    snapshot_download(repo, revision=folder.name, allow_patterns=exact, tqdm_class=bars)
    return folder


def _gap(repo: str, folder: Path, content: RepoContent | None) -> str | None:
    """The first needed file that is not whole, as a sentence; None if all are."""
    sizes = _listing(repo, folder)
    for name in _needed(folder, sizes, content or _kind_of(folder)):
        file, size = folder / name, (sizes or {}).get(name)
        if not file.is_file():  # a link without its blob, too
            return f"{name} is missing"
        if size is not None and file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes (delete {file.resolve()})"
    return None


def _needed(folder: Path, sizes: Mapping[str, int] | None, content: RepoContent) -> list[str]:
    """Names of the files without which the folder must not be used."""
    config = ADAPTER_CONFIG if content == "adapter" else CONFIG
    if sizes is not None:
        side = [name for name in sizes if name in AUXILIARY_FILES or fnmatchcase(name, ADDITIONAL_TEMPLATES)]
    elif content == "checkpoint" and not any((folder / name).is_file() for name in VOCABULARIES):
        side = [VOCABULARIES[0]]  # without a listing, weights alone look like a model that was fetched without it
    else:
        side = []
    return [config, *side, *_weights(folder, sizes, content)]


def _weights(folder: Path, sizes: Mapping[str, int] | None, content: RepoContent) -> list[str]:
    """Names of the weight files that will be read: as the readers choose them, one file before an index."""
    if content == "adapter":
        return [ADAPTER_WEIGHTS]
    single = WEIGHTS in sizes if sizes is not None else (folder / WEIGHTS).is_file()
    index = folder / INDEX
    if single or not index.is_file():
        return [WEIGHTS]
    weight_map = read_object(index, max_nbytes=MAX_INDEX_BYTES).get("weight_map")
    # whether the index makes sense is judged by the reader of the checkpoint
    return sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []


def _kind_of(folder: Path) -> RepoContent:
    return "adapter" if (folder / ADAPTER_CONFIG).is_file() else "checkpoint"


def _listing(repo: str, folder: Path) -> dict[str, int] | None:
    """Name → size in bytes of every file of the commit, if huggingface_hub has kept its listing."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=folder.name)}
    except CachedRepoTreeNotFoundError:
        return None


def _found_instead(repo: str, folder: Path) -> str:
    pickles = sorted(name for name in _listing(repo, folder) or {} if name.endswith(_PICKLES))
    if not pickles:
        return ""
    return (
        f"; found pickled weights ({pickles[0]}), which are not read: load them with transformers or PEFT and save "
        "them again with save_pretrained"
    )


def _reason(repo: str, revision: str, exc: Exception) -> str:
    """Why the hub did not help, and what does; one line."""
    from huggingface_hub import constants, errors

    # "not in the cache" is what snapshot_download makes of a failure; the failure itself is its cause
    cause = exc.__cause__ if isinstance(exc, errors.LocalEntryNotFoundError) and exc.__cause__ else exc
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(cause, errors.HFValidationError):
        return "the hub has no such names: expected org/name"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids a download: unset it, or run `hf download {repo} --revision {revision}` first"
    if isinstance(cause, errors.GatedRepoError):
        return f"the hub refuses it, it is gated: accept its terms at {constants.ENDPOINT}/{repo} and {login}"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"the hub has no such repository, or a private one: check the name, or {login}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return "the repository has no such revision: check the branch, tag or commit"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        advice = login if status in (401, 403) else "try again later"
        return f"the hub answers with HTTP {status}: {advice}"
    said = str(cause).strip().splitlines()
    detail = f"{type(cause).__name__}: {said[0]}" if said else type(cause).__name__
    return f"{constants.ENDPOINT} did not deliver it: check the network and try again ({detail})"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _bars(line: str, *, quiet: bool) -> Any:
    """The class of huggingface_hub's progress bars: its own on a terminal, else one that shows nothing.

    With ``quiet`` there is not even ``line``. (Its global switch obeys an environment variable first.)
    """
    from huggingface_hub.utils.tqdm import tqdm

    if not quiet and sys.stderr.isatty():
        return None

    class Hidden(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options["disable"] = True
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]  # tqdm has no annotations

    if not quiet:
        print(line, file=sys.stderr, flush=True)
    return Hidden


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Hide what huggingface_hub logs on the way: what matters of it is in the error."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)
