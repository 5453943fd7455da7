"""Check that the special token ids in config files match the tuned model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from exporter.io.json_objects import read_object
from exporter.sources.hf.special_tokens import SPECIAL_TOKENS, special_ids
from exporter.verify.expect.files import GENERATION
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check

#: Keys of config.json that follow the tokenizer.
SPECIAL_IDS: Final = frozenset(f"{role}_token_id" for role in SPECIAL_TOKENS)


def check_special_ids(config: Mapping[str, Any], files: Mapping[str, Path], reference: Reference) -> Check:
    """Check the special token ids in config.json and generation_config.json.

    Each special token id must equal the base model's id, unless the adapter's tokenizer assigns a new id to the special
    token.

    config: the parsed config.json.
    files: the auxiliary files in the folder of config.json.
    """
    base = reference.checkpoint
    before, after = special_ids(base.auxiliary_files), special_ids(reference.auxiliary_files)
    generation = (GENERATION, _generation(files), _generation(reference.auxiliary_files))
    adapter_has_one = any(GENERATION in adapter.auxiliary_files for adapter in reference.adapters)
    by_tokenizer = compare_special_ids(
        before, after, [("config.json", config, base.config), *([] if adapter_has_one else [generation])]
    )
    # The generation config of an adapter is used unchanged, and its ids do not follow the tokenizer.
    by_adapter = compare_special_ids({}, {}, [generation] if adapter_has_one else [])
    return by_tokenizer if by_adapter.passed else by_adapter


def compare_special_ids(
    before: Mapping[str, int],
    after: Mapping[str, int],
    pairs: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]],
) -> Check:
    """Check the special token ids in config files after tuning.

    If tuning changed the tokenizer's id of a special token, config files must contain the new id. If tuning did not
    change the tokenizer's id of a special token, the id in config files must be unchanged.

    before: the special token ids of the tokenizer before tuning.
    after: the special token ids of the tokenizer after tuning.
    pairs: for each config file, a tuple (file name, config after tuning, config before tuning).
    """
    wrong = []
    for role in SPECIAL_TOKENS:
        key = f"{role}_token_id"
        moved = role in after and after[role] != before.get(role)
        for name, config, base_config in pairs:
            value, want = config.get(key), base_config.get(key)
            named = after.get(role) in (value if isinstance(value, list) else [value])
            if not (named if moved and key in base_config else value == want):
                wrong.append(f"{name}: {key}: expected {after[role] if moved else want}, found {value}")
    detail = (
        wrong[0] if wrong else f"special token ids match the tokenizer: {', '.join(map(str, after.values())) or 'none'}"
    )
    return Check(name="special ids", passed=not wrong, detail=detail)


def _generation(files: Mapping[str, Path]) -> Mapping[str, Any]:
    return read_object(files[GENERATION]) if GENERATION in files else {}
