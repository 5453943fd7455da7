"""Known differences between llama.cpp and the tokenizers library, each as a change of the tokenizer.

If the changed tokenizer gives a text the token ids of llama.cpp, the change is the only cause of the difference.
Sources: ``tokenizer_st_partition`` and ``llama_vocab::impl::tokenize`` in llama-vocab.cpp; ``AddedVocabulary`` in the
tokenizers library.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer

Encode = Callable[[str], list[int]]

_MARK: Final = "\u2581"
_PREPEND: Final = (
    {"type": "Prepend", "prepend": _MARK},
    {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
)
#: Tokens after which llama.cpp keeps whitespace even if the name of the model contains phi-3, and tokens that a file
#: with such a name needs.
_KEPT: Final = {"<unk>", "<s>", "<|endoftext|>"}
_NEEDED: Final = _KEPT | {"</s>"}


def variants(content: Mapping[str, Any]) -> Iterator[tuple[str, Encode]]:
    """Yield pairs (a known difference, an encoder with this and all earlier differences) for a parsed tokenizer.json.

    Every encoder returns token ids without the special tokens that are added to each text.
    """
    changed = copy.deepcopy(dict(content))
    for reason, change in (
        *_FLAG_CHANGES,
        (_NORMALIZED, _match_raw),
        (_UNMAPPED, _unmapped),
        (_BREAKS, _breaks),
        (_SPACES, _spaces),
    ):
        if named := change(changed):
            yield reason.format(named).rstrip(), _encoder(changed)
    encode = _encoder(changed)
    added = changed.get("added_tokens") or ()
    ids = {str(entry["content"]): int(entry["id"]) for entry in added}
    stripping = {str(entry["content"]) for entry in added if entry.get("rstrip")}

    def longest_first(text: str) -> list[int]:
        out: list[int] = []
        previous = ""
        for part in split_longest_first(text, ids):
            out += [ids[part]] if part in ids else encode(part.lstrip() if previous in stripping else part)
            previous = part
        return out

    yield "llama.cpp matches the longest added token first, and transformers the first one in the text", longest_first


def split_longest_first(text: str, tokens: Mapping[str, int]) -> list[str]:
    """Split a text at tokens: first at every occurrence of the longest token (in bytes), then at the next shorter."""
    present = sorted((token for token in tokens if token in text), key=lambda token: -len(token.encode()))
    parts = [(text, False)]
    for token in present:
        parts = [piece for part in parts for piece in ([part] if part[1] else _around(part[0], token))]
    return [piece for piece, _ in parts if piece]


def _around(text: str, token: str) -> list[tuple[str, bool]]:
    pieces = text.split(token)
    return [pair for piece in pieces for pair in ((token, True), (piece, False))][1:]


def _encoder(content: Mapping[str, Any]) -> Encode:
    tokenizer = Tokenizer.from_str(json.dumps(content))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _clear(flag: str) -> Callable[[dict[str, Any]], str]:
    """Return a change that clears a flag of all added tokens, unless the name of the model can express the flag."""

    def change(content: dict[str, Any]) -> str:
        entries = content.get("added_tokens") or []
        flagged = [entry for entry in entries if entry.get(flag)]
        texts = {entry["content"] for entry in entries}
        names = {entry["content"] for entry in flagged}
        if flag == "rstrip" and names == texts - _KEPT and texts >= _NEEDED:
            return ""
        for entry in flagged:
            entry[flag] = False
        return ", ".join(map(repr, sorted(names)[:3])) + (", …" if len(names) > 3 else "")

    return change


_FLAG_CHANGES: Final[Sequence[tuple[str, Callable[[dict[str, Any]], str]]]] = tuple(
    (f"a GGUF has no key for the flag {flag} of the added tokens {{}}", _clear(flag))
    for flag in ("lstrip", "rstrip", "single_word")
)
_NORMALIZED: Final = "transformers matches added tokens in the normalised text, and llama.cpp in the raw text{}"
_UNMAPPED: Final = "llama.cpp does not apply the normalizer {}"
_SPACES: Final = "llama.cpp adds a space to each text after a special token, even before a space{}"


_BREAKS: Final = "transformers treats line breaks and tabs as spaces, and llama.cpp as unknown characters{}"


def _match_raw(content: dict[str, Any]) -> str:
    entries = [entry for entry in content.get("added_tokens") or [] if entry.get("normalized")]
    if content.get("normalizer") is None or not entries:
        return ""
    for entry in entries:
        entry["normalized"] = False
    return " "


def _unmapped(content: dict[str, Any]) -> str:
    """Remove the character map of a SentencePiece BPE, or the normalizer of a byte-level BPE."""
    normalizer, model = content.get("normalizer"), content.get("model") or {}
    if not isinstance(normalizer, dict) or model.get("type") != "BPE":
        return ""
    steps = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    steps = steps if isinstance(steps, list) else []
    spaces = ("Prepend", "Replace") if model.get("byte_fallback") else ()
    removed = [step for step in steps if step.get("type") not in spaces]
    kept = [step for step in steps if step not in removed]
    content["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    return ", ".join(str(step.get("type")) for step in removed)


def _breaks(content: dict[str, Any]) -> str:
    """Let a unigram tokenizer merge runs of spaces only, instead of all whitespace."""
    step = content.get("pre_tokenizer")
    steps = step.get("pretokenizers") if isinstance(step, dict) else None
    if not isinstance(steps, list) or {"type": "WhitespaceSplit"} not in steps:
        return ""
    (content["pre_tokenizer"],) = (step for step in steps if step != {"type": "WhitespaceSplit"})
    old = content.get("normalizer")
    runs = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    content["normalizer"] = {"type": "Sequence", "normalizers": [*([old] if old else []), runs, strip]}
    return " "


def _spaces(content: dict[str, Any]) -> str:
    """Let a SentencePiece tokenizer add a space to each text between added tokens, whatever the text begins with."""
    step = content.get("pre_tokenizer")
    if not isinstance(step, dict) or step.get("type") != "Metaspace" or step.get("prepend_scheme") == "never":
        return ""
    if (content.get("model") or {}).get("type") == "Unigram":
        changes = step.get("prepend_scheme") != "always"
        step["prepend_scheme"] = "always"
        return " " if changes else ""
    content["normalizer"], content["pre_tokenizer"] = {"type": "Sequence", "normalizers": list(_PREPEND)}, None
    return " "
