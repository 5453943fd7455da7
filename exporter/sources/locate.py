"""From what the user typed to a folder on disk: a path, or a hub id in the local cache, or downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from exporter.errors import BadInput, NotExpressible
from exporter.sources.adapter import CONFIG, Adapter
from exporter.sources.checkpoint import SIDE_FILES

#: What a checkpoint needs; pickles and other frameworks' weights stay on the hub.
_PATTERNS: Final = ["config.json", "*.safetensors", "model.safetensors.index.json", *SIDE_FILES]


def is_adapter(path: Path) -> bool:
    """A folder that PEFT would load as an adapter."""
    return (path / CONFIG).is_file()


def find_base(named: str | None, adapters: list[Adapter]) -> Path:
    """The base checkpoint: ``named`` if given, else the one base that the adapters agree on.

    Raises BadInput if nothing names a base, if the adapters name different ones, or if it cannot be had.
    """
    if named is not None:
        return locate(named, asked_by="--base")
    names = {str(adapter.path): adapter.base_name for adapter in adapters}
    distinct = set(names.values())
    where = adapters[0].path / CONFIG
    if distinct == {None}:
        raise BadInput(f"{where}: base_model_name_or_path: expected a path or hub id, found none; give --base")
    if len(distinct) > 1:
        found = ", ".join(sorted(str(name) for name in distinct))
        raise BadInput(f"{where}: base_model_name_or_path: expected one base for all adapters, found {found}")
    return locate(str(distinct.pop()), asked_by=f"{where}: base_model_name_or_path")


def locate(name: str, *, asked_by: str) -> Path:
    """The folder of ``name``: a path that exists, else a hub id (cache first, then download unless offline)."""
    path = Path(name)
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BadInput(f"{asked_by}: expected a folder or a hub id, found {name!r}, which does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as exc:  # pragma: no cover  # a runtime dependency of the package
        raise NotExpressible(asked_by, f"{name} is a hub id and huggingface_hub is not installed") from exc
    for cached_only in (True, False):
        try:
            folder = Path(snapshot_download(name, allow_patterns=_PATTERNS, local_files_only=cached_only))
        except Exception as exc:  # hub, network and cache errors share no base class
            reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        else:
            if not cached_only or any(folder.glob("*.safetensors")):
                return folder
            reason = "the cache holds no weights of it"  # somebody used its tokenizer alone
    raise BadInput(f"{asked_by}: {name}: neither a folder nor in the local cache, and not downloaded: {reason}")
