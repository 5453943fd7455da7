"""Updates the ids of special tokens in the configs, because a model with a new eos token must stop at that token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import GENERATION_CONFIG
from exporter.sources.hf.special_tokens import special_ids


def moved_ids(base: Mapping[str, Path], merged: Mapping[str, Path]) -> dict[str, tuple[int | None, int]]:
    """Name (bos, eos, pad) → (id in the base's tokenizer, id in the merged tokenizer), for ids that differ.

    base, merged: name → path of the auxiliary files before and after merging. Raises UnreadableFile.
    """
    if merged.get("tokenizer.json") == base.get("tokenizer.json"):
        return {}
    before, after = special_ids(base), special_ids(merged)
    return {name: (before.get(name), token_id) for name, token_id in after.items() if before.get(name) != token_id}


def generation_config(
    base: Mapping[str, Path], files: dict[str, Path]
) -> tuple[dict[str, Any], dict[str, tuple[int | None, int]]]:
    """(content of the generation config after merging, moved ids).

    base, files: name → path of the auxiliary files of the base and of the merged model. A generation config that has to
    change is removed from ``files``, because it is not copied. A generation config of an adapter stays unchanged.
    """
    moved = moved_ids(base, files)
    path = files.get(GENERATION_CONFIG)
    content = read_object(path) if path else {}
    if path == base.get(GENERATION_CONFIG) and follow(content, moved):
        del files[GENERATION_CONFIG]
    return content, moved


def follow(config: dict[str, Any], moved: Mapping[str, tuple[int | None, int]]) -> bool:
    """Replace moved ids in ``config``, if ``config`` has keys for the ids. Returns whether ``config`` changed.

    A list of eos ids keeps all other ids, because a chat model may stop at several tokens.
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
