"""Check that configs name the tokens by which the tuned model's tokenizer begins, ends and pads a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from exporter.sources.checkpoint import Checkpoint
from exporter.sources.json_objects import read_object
from exporter.sources.special_tokens import KINDS, special_ids
from exporter.verify.reference import Reference
from exporter.verify.report import Check

#: Keys of config.json that follow the tokenizer.
SPECIAL_IDS: Final = frozenset(f"{kind}_token_id" for kind in KINDS)
_GENERATION: Final = "generation_config.json"


def check_special_ids(merged: Checkpoint, reference: Reference) -> Iterator[Check]:
    """One check: an id is the base's, unless the tuned tokenizer has another one, which then must be named."""
    base = reference.checkpoint
    pairs = [("config.json", merged.config, base.config)]
    if not any(_GENERATION in adapter.side_files for adapter in reference.adapters):
        pairs.append((_GENERATION, _generation(merged), _generation(base)))
    yield compare_special_ids(special_ids(base.side_files), special_ids(merged.side_files), pairs)


def compare_special_ids(
    before: Mapping[str, int],
    after: Mapping[str, int],
    pairs: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]],
) -> Check:
    """The same for any folder. before, after: ids by the tokenizers. pairs: name of a config, after and before."""
    wrong = []
    for kind in KINDS:
        key = f"{kind}_token_id"
        moved = kind in after and after[kind] != before.get(kind)
        for name, found, original in pairs:
            value, want = found.get(key), original.get(key)
            named = after.get(kind) in (value if isinstance(value, list) else [value])
            if not (named if moved and key in original else value == want):
                wrong.append(f"{name}: {key}: expected {after[kind] if moved else want}, found {value}")
    detail = wrong[0] if wrong else f"as the tokenizer has them: {', '.join(map(str, after.values())) or 'none named'}"
    return Check(name="special ids", passed=not wrong, detail=detail)


def _generation(checkpoint: Checkpoint) -> Mapping[str, Any]:
    path = checkpoint.side_files.get(_GENERATION)
    return read_object(path) if path else {}
