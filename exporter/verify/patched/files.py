"""Check the tokenizer, the configs and all other files, except the models, in a folder with patched models.

After a patch, the tokenizer must equal the adapters' tokenizer, the configs must match the new vocabulary size, and all
other files must be unchanged.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.io.files import read_file
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import auxiliary_files, is_auxiliary
from exporter.sources.hf.special_tokens import special_ids
from exporter.sources.peft.adapter import Adapter
from exporter.verify.expect.files import tuned_files
from exporter.verify.folder.special_ids import SPECIAL_IDS, compare_special_ids
from exporter.verify.report import Check

#: Metadata keys for the adapters and the origin of the base.
PROVENANCE: Final = ("ttexport.adapter", "ttexport.base.repo", "ttexport.base.revision")
_CONFIG: Final = "config.json"
_GENAI: Final = "genai_config.json"
_GENERATION: Final = "generation_config.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"


@dataclass(frozen=True)
class FilesBefore:
    """The files of a folder before a patch, without the model files.

    digests: path relative to the folder → SHA-256 digest of the file. configs: name of a config file → parsed content,
    or {} if the file does not exist. special_ids: config key, such as eos_token_id → token id.
    """

    digests: Mapping[str, str]
    configs: Mapping[str, Mapping[str, Any]]
    special_ids: Mapping[str, int]

    @classmethod
    def read(cls, folder: Path, models: Set[Path]) -> FilesBefore:
        """Read the files in ``folder``, except the model files, before a patch.

        models: model files, which are skipped because separate checks compare models. Peak memory: the size of the
        config files.
        """
        return cls(_digests(folder, models), _configs(folder), special_ids(auxiliary_files(folder)))


def check_files(
    folder: Path, before: FilesBefore, adapters: Sequence[Adapter], models: Set[Path], *, vocab: int | None
) -> Iterator[Check]:
    """Check the files of ``folder``, except its model files, after a patch.

    vocab: number of tokens after the patch, or None if the patch does not change the number of tokens. models: model
    files, which are skipped because separate checks compare models.
    """
    adapter_files = tuned_files({}, [adapter.auxiliary_files for adapter in adapters])
    after, configs = _digests(folder, models), _configs(folder)
    # A patch replaces all tokenizer files together, and clients look for the chat template in two files.
    wrong = [
        name for name in sorted(before.digests.keys() | after.keys()) if before.digests.get(name) != after.get(name)
    ]
    free = {_CONFIG, _GENAI, _GENERATION, *(filter(is_auxiliary, wrong) if adapter_files else ())}
    wrong = [name for name in wrong if name not in free]
    yield _check("other files", wrong, f"compared {len(after)} files other than model files with the base")
    missing = [name for name, path in sorted(adapter_files.items()) if not _same(folder / name, path)]
    yield _check("tokenizer files", missing, f"{len(adapter_files)} tokenizer files match the adapters' files")
    yield _check(
        "configs",
        list(_config_errors(before.configs, configs, vocab)),
        "the config files match the base and the vocabulary size",
    )
    pairs = [(_CONFIG, configs[_CONFIG], before.configs[_CONFIG])]
    if _GENERATION not in adapter_files:
        pairs.append((_GENERATION, configs[_GENERATION], before.configs[_GENERATION]))
    yield compare_special_ids(before.special_ids, special_ids(auxiliary_files(folder)), pairs)


def _check(name: str, wrong: Sequence[str], description: str) -> Check:
    detail = (
        f"{len(wrong)} files or config keys differ from base and adapters; the first is {wrong[0]}"
        if wrong
        else description
    )
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
    """Yield the config keys with values that the patch changed by mistake.

    A patch may change the ids of special tokens, must set vocab_size to ``vocab`` if the vocabulary grows, and must not
    change any other value.
    """
    for key in sorted((old.keys() | new.keys()) - free - SPECIAL_IDS):
        want = vocab if key == "vocab_size" and vocab is not None and key in old else old.get(key)
        if new.get(key) != want:
            yield key


def _same(path: Path, adapter_file: Path) -> bool:
    if not path.is_file():
        return False
    if adapter_file.name != _TOKENIZER_CONFIG:
        return read_file(path) == read_file(adapter_file)
    content, expected = read_object(path), read_object(adapter_file)
    return all(content.get(key) == expected.get(key) for key in (content.keys() | expected.keys()) - {"chat_template"})


def _configs(folder: Path) -> dict[str, Mapping[str, Any]]:
    paths = {name: folder / name for name in (_CONFIG, _GENAI, _GENERATION)}
    return {name: read_object(path) if path.is_file() else {} for name, path in paths.items()}


def _digests(folder: Path, models: Set[Path]) -> dict[str, str]:
    digests = {}
    for subfolder, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(subfolder) / name for name in names):
            if path not in models:
                digests[path.relative_to(folder).as_posix()] = _digest(path)
    return digests


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
