"""Check of a folder's config.json: the base's, apart from what follows the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from exporter.verify.expect.reference import Reference
from exporter.verify.folder.special_ids import SPECIAL_IDS
from exporter.verify.report import Check

#: Keys that follow the weights, or say which version of which tool wrote the file.
_FOLLOWING: Final = frozenset({"vocab_size", "dtype", "torch_dtype", "tie_word_embeddings", "transformers_version"})
#: T5 derives this from the tie flag, so an untied head pins it.
_SCALES: Final = frozenset({"scale_decoder_outputs"})
#: What transformers.js is told of the files of a folder; checked with the graphs.
BROWSER: Final = "transformers.js_config"


def check_config(config: Mapping[str, Any], reference: Reference) -> Check:
    """Yield one check of the parsed config.json, its part on the text model included."""
    base = reference.checkpoint
    untied = base.tie.tied and not reference.tied
    free = _FOLLOWING | SPECIAL_IDS | {"text_config", BROWSER} | (_SCALES if untied else set())
    own = _text(config)
    wrong = [*_differing(config, base.config, free)]
    if own is not config or base.text_config is not base.config:
        wrong += [f"text_config.{key}" for key in _differing(own, base.text_config, free)]
    if own.get("vocab_size") not in (None, reference.vocab):
        wrong.append("vocab_size")
    flag = False if untied else base.text_config.get("tie_word_embeddings")
    if own.get("tie_word_embeddings", config.get("tie_word_embeddings")) != flag:
        wrong.append("tie_word_embeddings")
    detail = f"config.json: {wrong[0]}: not what base and adapters give" if wrong else "agrees with the base"
    return Check(name="config", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], free: frozenset[str]) -> Iterator[str]:
    yield from (key for key in sorted((one.keys() | other.keys()) - free) if one.get(key) != other.get(key))
