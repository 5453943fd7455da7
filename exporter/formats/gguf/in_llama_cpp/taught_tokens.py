"""Notes on what llama.cpp will do with the tokens that the adapters taught, whichever maker writes the GGUF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from exporter.formats.gguf.vocab.added_tokens import added_tokens
from exporter.io.json_objects import read_object
from exporter.merge.plan import MergePlan
from exporter.sources.hf.by_llama_cpp.tokens import MatchedToken, looks_like_control, token_notes
from exporter.sources.hf.tokenizer import token_ids
from exporter.sources.peft.edits import TokenRows


def taught_token_notes(merge: MergePlan) -> list[str]:
    """Return a sentence for each way in which llama.cpp treats trained or new tokens unlike transformers.

    New tokens are the tokens of the merged tokenizer that the base's tokenizer lacks. A model without a tokenizer.json
    has no notes. Raises UnreadableFile if a tokenizer.json cannot be parsed.
    """
    if merge.tokenizer is None or not merge.adapters:
        return []
    content = merge.tokenizer.content
    vocabulary = content["model"].get("vocab")
    matched = list(_matched(merge, content))
    known = {**(vocabulary if isinstance(vocabulary, dict) else {}), **{token.text: token.id for token in matched}}
    taught = {
        token_id
        for adapter in merge.adapters
        for edit in adapter.edits
        if isinstance(edit, TokenRows)
        for token_id in edit.token_ids
        if token_id not in edit.untrained
    }
    base = merge.checkpoint.auxiliary_files.get("tokenizer.json")
    if base is not None and base != merge.tokenizer.path:
        taught |= set(known.values()) - token_ids(base)
    return token_notes(known, matched, taught, set(_ends(merge)))


def _matched(merge: MergePlan, content: Mapping[str, Any]) -> Iterator[MatchedToken]:
    path = merge.files.get("tokenizer_config.json")
    for token in added_tokens(merge.files, content, read_object(path) if path else {}):
        control = token.special or looks_like_control(token.text)
        yield MatchedToken(token.id, token.text, token.normalized, control)


def _ends(merge: MergePlan) -> Iterator[int]:
    """Yield the ids at which transformers ends generation, from generation_config.json or else from config.json."""
    ids = merge.generation_config.get("eos_token_id")
    ids = merge.checkpoint.text_config.get("eos_token_id") if ids is None else ids
    for token_id in ids if isinstance(ids, list) else [ids]:
        if type(token_id) is int:
            yield token_id
