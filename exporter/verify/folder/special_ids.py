"""Check that configs name the tokens by which the tuned model's tokenizer begins, ends and pads a text."""

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
SPECIAL_IDS: Final = frozenset(f"{kind}_token_id" for kind in SPECIAL_TOKENS)


def check_special_ids(config: Mapping[str, Any], files: Mapping[str, Path], reference: Reference) -> Check:
    """An id is the base's, unless the tuned tokenizer has another one, which then must be named.

    config: the parsed config.json; files: those beside it.
    """
    base = reference.checkpoint
    before, after = special_ids(base.auxiliary_files), special_ids(reference.auxiliary_files)
    generation = (GENERATION, _generation(files), _generation(reference.auxiliary_files))
    own = any(GENERATION in adapter.auxiliary_files for adapter in reference.adapters)
    found = compare_special_ids(before, after, [("config.json", config, base.config), *([] if own else [generation])])
    # A generation config that an adapter brings is its own word, and nothing in it follows.
    brought = compare_special_ids({}, {}, [generation] if own else [])
    return found if brought.passed else brought


def compare_special_ids(
    before: Mapping[str, int],
    after: Mapping[str, int],
    pairs: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]],
) -> Check:
    """The same for any folder. before, after: ids by the tokenizers. pairs: name of a config, after and before."""
    wrong = []
    for kind in SPECIAL_TOKENS:
        key = f"{kind}_token_id"
        moved = kind in after and after[kind] != before.get(kind)
        for name, found, original in pairs:
            value, want = found.get(key), original.get(key)
            named = after.get(kind) in (value if isinstance(value, list) else [value])
            if not (named if moved and key in original else value == want):
                wrong.append(f"{name}: {key}: expected {after[kind] if moved else want}, found {value}")
    detail = wrong[0] if wrong else f"as the tokenizer has them: {', '.join(map(str, after.values())) or 'none named'}"
    return Check(name="special ids", passed=not wrong, detail=detail)


def _generation(files: Mapping[str, Path]) -> Mapping[str, Any]:
    return read_object(files[GENERATION]) if GENERATION in files else {}
