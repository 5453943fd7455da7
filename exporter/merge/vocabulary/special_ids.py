"""Updates the ids of special tokens in the configs, so that, for example, a model stops at a new eos token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import GENERATION_CONFIG
from exporter.sources.hf.special_tokens import special_ids


def moved_ids(base: Mapping[str, Path], merged: Mapping[str, Path]) -> dict[str, tuple[int | None, int]]:
    """Return {special token (bos, eos or pad) whose id changes: (id before merging, id after merging)}.

    base, merged: the auxiliary files before and after merging, as dicts from file names to paths. Raises UnreadableFile
    if a tokenizer file or config is invalid.
    """
    if merged.get("tokenizer.json") == base.get("tokenizer.json"):
        return {}
    before, after = special_ids(base), special_ids(merged)
    return {name: (before.get(name), token_id) for name, token_id in after.items() if before.get(name) != token_id}


def generation_config(
    base: Mapping[str, Path], files: dict[str, Path]
) -> tuple[dict[str, Any], dict[str, tuple[int | None, int]]]:
    """Return (content of generation_config.json after merging, special token ids that change).

    base, files: the auxiliary files of the base model and of the merged model, as dicts from file names to paths. If
    the ids in generation_config.json change, the function removes generation_config.json from ``files``, because all
    files in ``files`` are copied unchanged. A generation_config.json from an adapter is never changed.
    """
    moved = moved_ids(base, files)
    path = files.get(GENERATION_CONFIG)
    content = read_object(path) if path else {}
    if path == base.get(GENERATION_CONFIG) and follow(content, moved):
        del files[GENERATION_CONFIG]
    return content, moved


def follow(config: dict[str, Any], moved: Mapping[str, tuple[int | None, int]]) -> bool:
    """Replace the changed special token ids in ``config``, without adding new keys.

    Returns whether ``config`` changed. In a list of eos ids, only the changed id is replaced, because the other ids are
    further stop tokens.
    """
    changed = False
    for name, (before, after) in moved.items():
        key = f"{name}_token_id"
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
