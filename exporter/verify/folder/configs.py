"""Check that config.json equals the base model's config.json, except for keys that tuning may change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final

from exporter.sources.hf.tables import resize_config
from exporter.verify.expect.reference import Reference
from exporter.verify.folder.special_ids import SPECIAL_IDS
from exporter.verify.report import Check

#: Keys that follow the weights, and the version of the tool that wrote the file.
_FOLLOWING: Final = frozenset({"vocab_size", "dtype", "torch_dtype", "tie_word_embeddings", "transformers_version"})
#: T5 derives the flag scale_decoder_outputs from the tie flag, so untying the head sets the flag explicitly.
_SCALES: Final = frozenset({"scale_decoder_outputs"})
#: Key with the settings of transformers.js for the files of the folder, checked together with the graphs.
BROWSER: Final = "transformers.js_config"


def check_config(config: Mapping[str, Any], reference: Reference) -> Check:
    """Compare a parsed config.json, including the section ``text_config``, with the base model's config.json."""
    base = reference.checkpoint
    untied = base.tie.tied and not reference.tied
    free = _FOLLOWING | SPECIAL_IDS | {"text_config", BROWSER} | (_SCALES if untied else set())
    text, expected = _text(config), copy.deepcopy(dict(base.config))
    if reference.vocab != reference.base_vocab:
        resize_config(expected, base, reference.vocab)
    wrong = [*_differing(config, expected, free)]
    if text is not config or base.text_config is not base.config:
        wrong += [f"text_config.{key}" for key in _differing(text, _text(expected), free)]
    if text.get("vocab_size") != _text(expected).get("vocab_size"):
        wrong.append("vocab_size")
    flags, base_flags = _flags(config, text), _flags(base.config, base.text_config)
    if (any(flags) or flags[0] is not False) if untied else flags != base_flags:
        wrong.append("tie_word_embeddings")
    detail = (
        f"config.json: {wrong[0]} does not match base and adapters"
        if wrong
        else "config.json matches base and adapters"
    )
    return Check(name="config", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _flags(*tables: Mapping[str, Any]) -> list[Any]:
    return [table.get("tie_word_embeddings") for table in tables]


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def _differing(config: Mapping[str, Any], expected: Mapping[str, Any], free: frozenset[str]) -> Iterator[str]:
    yield from (key for key in sorted((config.keys() | expected.keys()) - free) if config.get(key) != expected.get(key))
