"""What lies beside patched models: the adapters' tokenizer, configs that agree with it, and all else as it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.io.files import read_file
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import AUXILIARY_FILES, auxiliary_files
from exporter.sources.hf.special_tokens import special_ids
from exporter.sources.peft.adapter import Adapter
from exporter.verify.folder.special_ids import SPECIAL_IDS, compare_special_ids
from exporter.verify.report import Check

_CONFIG: Final = "config.json"
_GENAI: Final = "genai_config.json"
_GENERATION: Final = "generation_config.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"


@dataclass(frozen=True)
class FilesBefore:
    """Everything in a folder but its models. digests: path below it → SHA-256. configs: parsed; {} for none."""

    digests: Mapping[str, str]
    configs: Mapping[str, Mapping[str, Any]]
    special_ids: Mapping[str, int]

    @classmethod
    def read(cls, folder: Path, models: Set[Path]) -> FilesBefore:
        """``models``: files that are judged elsewhere. Memory: the configs."""
        return cls(_digests(folder, models), _configs(folder), special_ids(auxiliary_files(folder)))


def check_files(
    folder: Path, before: FilesBefore, adapters: Sequence[Adapter], models: Set[Path], *, vocab: int | None
) -> Iterator[Check]:
    """Judge ``folder``. vocab: tokens, None where they are as many as before. models: as for ``FilesBefore``."""
    brought = {name: path for adapter in adapters for name, path in adapter.auxiliary_files.items()}
    after, configs = _digests(folder, models), _configs(folder)
    # A set of tokenizer files is replaced as a whole, and clients look for the template in two places.
    free = {_CONFIG, _GENAI, _GENERATION} | (set(AUXILIARY_FILES) if brought else set())
    wrong = [
        name for name in sorted(before.digests.keys() | after.keys()) if before.digests.get(name) != after.get(name)
    ]
    wrong = [name for name in wrong if name not in free and not name.startswith("additional_chat_templates/")]
    yield _check("other files", wrong, f"{len(after)} files beside the models")
    missing = [name for name, path in sorted(brought.items()) if not _same(folder / name, path)]
    yield _check("tokenizer files", missing, f"{len(brought)} files of the adapters")
    yield _check("configs", list(_config_errors(before.configs, configs, vocab)), "agree with the vocabulary")
    pairs = [(_CONFIG, configs[_CONFIG], before.configs[_CONFIG])]
    if _GENERATION not in brought:
        pairs.append((_GENERATION, configs[_GENERATION], before.configs[_GENERATION]))
    yield compare_special_ids(before.special_ids, special_ids(auxiliary_files(folder)), pairs)


def _check(name: str, wrong: Sequence[str], what: str) -> Check:
    detail = f"{wrong[0]} is not what base and adapters give, and {len(wrong) - 1} more" if wrong else what
    return Check(name=name, passed=not wrong, detail=detail)


def _config_errors(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]], vocab: int | None
) -> Iterator[str]:
    old, new = before[_CONFIG], after[_CONFIG]
    yield from (f"{_CONFIG}: {key}" for key in _differing(old, new, {"text_config"}, vocab))
    yield from (f"{_CONFIG}: text_config.{key}" for key in _differing(_table(old), _table(new), set(), vocab))
    old, new = before[_GENAI], after[_GENAI]
    yield from (f"{_GENAI}: {key}" for key in _differing(old, new, {"model"}, None))
    models = old.get("model", {}), new.get("model", {})
    yield from (f"{_GENAI}: model.{key}" for key in _differing(*models, set(), vocab))
    ids = {**after[_CONFIG], **after[_GENERATION]}
    for key in SPECIAL_IDS & ids.keys() & models[1].keys():
        moved = ids[key] != {**before[_CONFIG], **before[_GENERATION]}.get(key)
        if moved and ids[key] is not None and models[1][key] != ids[key]:
            yield f"{_GENAI}: model.{key}"


def _table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else {}


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], free: Set[str], vocab: int | None) -> Iterator[str]:
    """Keys that differ and may not: ids of special tokens may, the size must where it grows."""
    for key in sorted((old.keys() | new.keys()) - free - SPECIAL_IDS):
        want = vocab if key == "vocab_size" and vocab is not None and key in old else old.get(key)
        if new.get(key) != want:
            yield key


def _same(found: Path, brought: Path) -> bool:
    if not found.is_file():
        return False
    if brought.name != _TOKENIZER_CONFIG:
        return read_file(found) == read_file(brought)
    one, other = read_object(found), read_object(brought)
    return all(one.get(key) == other.get(key) for key in (one.keys() | other.keys()) - {"chat_template"})


def _configs(folder: Path) -> dict[str, Mapping[str, Any]]:
    paths = {name: folder / name for name in (_CONFIG, _GENAI, _GENERATION)}
    return {name: read_object(path) if path.is_file() else {} for name, path in paths.items()}


def _digests(folder: Path, models: Set[Path]) -> dict[str, str]:
    found = {}
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(here) / name for name in names):
            if path not in models:
                found[path.relative_to(folder).as_posix()] = _digest(path)
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
