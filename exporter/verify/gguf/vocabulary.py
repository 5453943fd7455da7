"""Checks of a GGUF's vocabulary against the tokenizer of the tuned model: texts, types, merges, chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.hf.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_model
from exporter.verify.expect.files import AddedToken, added, settings, templates
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check, Skip

_KEYS: Final = "tokenizer.ggml."
_BYTE: Final = re.compile("<0x[0-9A-F]{2}>")
#: llama.cpp's converter takes tokens of these looks for control tokens, whatever the tokenizer says of them.
_LIKE_CONTROL: Final = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<unused.*>|<\|.*\|>|<\uff5c.*\uff5c>", re.DOTALL)
#: SentencePiece writes a space as this.
_SPACE: Final = "\u2581"


def check_tokens(parts: GgufModel, reference: Reference) -> Iterator[Check | Skip]:
    """Yield the checks; without a tokenizer.json the tokens have nothing to be compared with."""
    yield _check_template(parts, reference)
    if not (content := reference.tokenizer):
        yield Skip("tokens", "the tuned model has no tokenizer.json")
        return
    texts, types = (_array(parts, name) for name in ("tokens", "token_type"))
    own, known = added(content), _vocabulary(content)
    yield _check_texts(texts, known, own, reference.vocab)
    yield _check_types(types, texts, content, known, own, reference)
    if parts.metadata.get(f"{_KEYS}model") == "gpt2":
        yield _check_merges(_array(parts, "merges"), content)


def _array(parts: GgufModel, name: str) -> list[Any]:
    value = parts.metadata.get(_KEYS + name)
    return value.values() if isinstance(value, GgufArray) else []


def _vocabulary(content: Mapping[str, Any]) -> dict[int, str]:
    """Id → text of the model's own tokens; a unigram model has them in the order of their ids."""
    vocab = content["model"].get("vocab") or {}
    if isinstance(vocab, dict):
        return {token_id: text for text, token_id in vocab.items()}
    return {token_id: str(piece[0]) for token_id, piece in enumerate(vocab) if isinstance(piece, list) and piece}


def _check_texts(found: Sequence[str], known: Mapping[int, str], own: Mapping[int, AddedToken], rows: int) -> Check:
    """Every row has the text of its token, so that decoding gives the same; no added token is blank."""
    wanted = {**known, **{token_id: token.text for token_id, token in own.items()}}
    wrong = [] if len(found) == rows else [f"expected {rows} tokens, one a row, found {len(found)}"]
    likely = map(wanted.get, range(len(found)))
    for token_id in [
        one for one, (text, want) in enumerate(zip(found, likely, strict=True)) if text != want or not text
    ]:
        want, text = wanted.get(token_id, f"[PAD{token_id}]"), found[token_id]
        if text not in (want, want.replace(_SPACE, " ")) or not text:
            wrong.append(f"token {token_id}: expected {want!r:.60}, found {text!r:.60}")
    detail = f"{len(found)} texts, {len(own)} of added tokens" if not wrong else wrong[0]
    return Check(name="tokens", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _check_types(
    found: Sequence[int],
    texts: Sequence[str],
    content: Mapping[str, Any],
    known: Mapping[int, str],
    own: Mapping[int, AddedToken],
    reference: Reference,
) -> Check:
    """A control token is never shown and never made of a text's pieces; a user-defined one is shown."""
    path = reference.auxiliary_files.get("tokenizer.model")
    pieces = read_model(path).types if path else []
    model, byte_level = content["model"], _is_byte_level(content)
    unknown = known.get(model.get("unk_id"), model.get("unk_token"))
    wrong = [] if len(found) == len(texts) else [f"expected a type a token, found {len(found)} for {len(texts)}"]
    looked_at: Iterable[int] = range(min(len(found), len(texts)))
    if byte_level and not pieces:  # nearly all tokens of such a vocabulary are normal ones, and right
        odd = {token_id for token_id, kind in enumerate(found) if kind != NORMAL}
        looked_at = sorted(set(looked_at) & (odd | own.keys()) | set(looked_at) - known.keys())
    for token_id in looked_at:
        kind, text = found[token_id], texts[token_id]
        if token_id in own:
            token = own[token_id]
            allowed = {CONTROL if token.special or _LIKE_CONTROL.fullmatch(token.text) else USER_DEFINED}
            # What is special in tokenizer.json may be more particular in the SentencePiece model.
            allowed |= {pieces[token_id]} - {NORMAL} if token_id < len(pieces) else set()
            allowed |= {UNKNOWN} if token.text == unknown and not byte_level else set()
        elif token_id < len(pieces):
            allowed = {pieces[token_id]}
        elif token_id not in known:
            allowed = {UNUSED}
        elif byte_level:
            allowed = {NORMAL}
        else:
            fallback = model.get("byte_fallback") and _BYTE.fullmatch(text)
            allowed = {BYTE if fallback else UNKNOWN if text == unknown else NORMAL}
        if kind not in allowed:
            wrong.append(f"token {token_id}, {text!r:.60}: expected type {min(allowed)}, found {kind}")
    detail = f"{len(found)} types" if not wrong else wrong[0]
    return Check(name="token types", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    model = content["model"]
    return model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")


def _check_merges(found: Sequence[str], content: Mapping[str, Any]) -> Check:
    """The same pairs in the same order: it decides which tokens a text becomes."""
    pairs = content["model"].get("merges") or []
    if pairs and isinstance(pairs[0], str):
        pairs = [pair.split(" ", 1) for pair in pairs]
    wanted = [" ".join(pair) for pair in pairs]
    if wanted != found:
        # A space inside a token would end it; byte-level vocabularies have a letter of their own for it.
        wanted = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in pairs]
    place = next((rank for rank, (one, other) in enumerate(zip(wanted, found, strict=False)) if one != other), None)
    if place is not None:
        detail = f"merge {place}: expected {wanted[place]!r:.60}, found {found[place]!r:.60}"
    else:
        detail = f"{len(found)} merges"
    if len(wanted) != len(found):
        detail = f"expected {len(wanted)} merges, found {len(found)}"
    return Check(name="merges", passed=list(found) == wanted, detail=detail)


def _check_template(parts: GgufModel, reference: Reference) -> Check:
    """Every template by its name, with the same text: then it renders the same chats."""
    prefix = "tokenizer.chat_template"
    found = {
        key.removeprefix(prefix).removeprefix(".") or "default": value
        for key, value in parts.metadata.items()
        if key == prefix or key.startswith(f"{prefix}.")
    }
    files = reference.auxiliary_files
    wanted = {re.sub(r"[^A-Za-z0-9]", "_", name): {text} for name, text in templates(files).items() if text}
    if isinstance(stated := settings(files).get("chat_template"), str) and "default" in wanted:
        wanted["default"].add(stated)  # llama.cpp's converter reads the settings before the file
    wrong = [
        f"{name}: expected {'a template' if name in wanted else 'none'}, found "
        f"{'another text' if name in found and name in wanted else 'one' if name in found else 'none'}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) not in wanted.get(name, ())
    ]
    detail = wrong[0] if wrong else f"{len(found)} as the tuned model has"
    return Check(name="chat template", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
