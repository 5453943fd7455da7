"""Special-token ids in the configs follow the adapter's tokenizer: a model that learnt another end must stop at it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporter.io.json_objects import read_object
from exporter.sources.hf.special_tokens import special_ids

_NAME: Final = "generation_config.json"


def moved_ids(base: Mapping[str, Path], merged: Mapping[str, Path]) -> dict[str, tuple[int | None, int]]:
    """Kind → (id by the base's tokenizer, id by the merged one), for those that an adapter's tokenizer changes.

    base, merged: side files by name. Raises UnreadableFile.
    """
    if merged.get("tokenizer.json") == base.get("tokenizer.json"):
        return {}
    before, after = special_ids(base), special_ids(merged)
    return {kind: (before.get(kind), found) for kind, found in after.items() if before.get(kind) != found}


def generation_config(
    base: Mapping[str, Path], files: dict[str, Path]
) -> tuple[dict[str, Any], dict[str, tuple[int | None, int]]]:
    """(content after merging, moved ids). base, files: side files of base and merged model by name.

    A file that has to change is taken out of ``files``: it is not copied. A generation config that an adapter brings
    is taken as it is.
    """
    moved = moved_ids(base, files)
    path = files.get(_NAME)
    content = read_object(path) if path else {}
    if path == base.get(_NAME) and follow(content, moved):
        del files[_NAME]
    return content, moved


def follow(config: dict[str, Any], moved: Mapping[str, tuple[int | None, int]]) -> bool:
    """Set the moved ids in ``config``, where it has such an entry; whether anything changed.

    A list of ends keeps its other members: a chat model may stop at several tokens.
    """
    changed = False
    for kind, (before, after) in moved.items():
        key = f"{kind}_token_id"
        if key not in config:
            continue
        value = config[key]
        if isinstance(value, list):
            others = [item for item in value if item not in (before, after)]
            config[key] = [after, *others]
        else:
            config[key] = after
        changed |= config[key] != value
    return changed
