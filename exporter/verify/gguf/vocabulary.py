"""Check a GGUF's token texts, token types, merges and chat templates against the tuned model's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.hf.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_model
from exporter.verify.expect.added_tokens import loaded_tokens
from exporter.verify.expect.files import AddedToken, added
from exporter.verify.expect.reference import Reference
from exporter.verify.expect.templates import stored_name
from exporter.verify.report import Check, Skip

_KEYS: Final = "tokenizer.ggml."
_BYTE: Final = re.compile("<0x[0-9A-F]{2}>")
#: Texts that llama.cpp's converter treats as control tokens, regardless of the tokenizer's flags.
_LOOKS_LIKE_CONTROL: Final = re.compile(
    r"<pad>|<mask>|<2mass>|\[@BOS@\]|<unused.*>|<\|(.*\|)?>|<\uff5c(.*\uff5c)?>", re.DOTALL
)
#: SentencePiece's character for a space.
_SPACE: Final = "\u2581"


def check_tokens(gguf: GgufModel, reference: Reference) -> Iterator[Check | Skip]:
    """Yield the checks of a GGUF's vocabulary.

    If the tuned model has no tokenizer.json, only the chat templates are checked.
    """
    yield _check_template(gguf, reference)
    if not (content := reference.tokenizer):
        yield Skip("tokens", "the tuned model has no tokenizer.json")
        return
    texts, types = (_array(gguf, name) for name in ("tokens", "token_type"))
    added_tokens, known = loaded_tokens(reference.auxiliary_files, content), _vocabulary(content)
    # A token without an embedding row, which only the settings name, is not part of any artifact.
    added_tokens = {
        token_id: token
        for token_id, token in added_tokens.items()
        if token_id < reference.vocab or token_id in added(content)
    }
    mark = _SPACE if _is_byte_level(content) else " "
    yield _check_texts(texts, known, added_tokens, reference.vocab, mark)
    yield _check_types(types, texts, content, known, added_tokens, reference)
    if gguf.metadata.get(f"{_KEYS}model") == "gpt2":
        yield _check_merges(_array(gguf, "merges"), content)


def _array(gguf: GgufModel, name: str) -> list[Any]:
    value = gguf.metadata.get(_KEYS + name)
    return value.values() if isinstance(value, GgufArray) else []


def _vocabulary(content: Mapping[str, Any]) -> dict[int, str]:
    """Return a dict from token id to text for the tokens in section ``model`` of tokenizer.json, without added tokens.

    For a unigram model, tokenizer.json contains a list of tokens, and the index in the list is the token id.
    """
    vocab = content["model"].get("vocab") or {}
    if isinstance(vocab, dict):
        return {token_id: text for text, token_id in vocab.items()}
    return {token_id: str(piece[0]) for token_id, piece in enumerate(vocab) if isinstance(piece, list) and piece}


def _check_texts(
    texts: Sequence[str], known: Mapping[int, str], added_tokens: Mapping[int, AddedToken], rows: int, mark: str
) -> Check:
    """Check that the GGUF has the correct, non-empty token text for every row of the embedding.

    mark: the character that may stand for SentencePiece's mark of a space. In a byte-level BPE, the mark stays.
    """
    wanted = {**known, **{token_id: token.text for token_id, token in added_tokens.items()}}
    wrong = [] if len(texts) == rows else [f"expected {rows} tokens (one per embedding row), found {len(texts)}"]
    expected_texts = map(wanted.get, range(len(texts)))
    for token_id in [
        number
        for number, (text, want) in enumerate(zip(texts, expected_texts, strict=True))
        if text != want or not text
    ]:
        want, text = wanted.get(token_id, f"[PAD{token_id}]"), texts[token_id]
        if text not in (want, want.replace(_SPACE, mark)) or not text:
            wrong.append(f"token {token_id}: expected the text {want!r:.60}, found {text!r:.60}")
    detail = (
        wrong[0] if wrong else f"{len(texts)} tokens, including {len(added_tokens)} added tokens, match the tokenizer"
    )
    return Check(name="tokens", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _check_types(
    types: Sequence[int],
    texts: Sequence[str],
    content: Mapping[str, Any],
    known: Mapping[int, str],
    added_tokens: Mapping[int, AddedToken],
    reference: Reference,
) -> Check:
    """Check that the type of every token in the GGUF, such as control or user-defined, agrees with the tokenizer.

    A runtime never prints a control token, and never produces a control token when tokenizing plain text. Runtimes
    print user-defined tokens in the same way as ordinary tokens.
    """
    path = reference.auxiliary_files.get("tokenizer.model")
    pieces = read_model(path).types if path else []
    model, byte_level = content["model"], _is_byte_level(content)
    unknown = known.get(model.get("unk_id"), model.get("unk_token"))
    wrong = [] if len(types) == len(texts) else [f"expected {len(texts)} token types, found {len(types)}"]
    checked: Iterable[int] = range(min(len(types), len(texts)))
    if byte_level and not pieces:  # nearly all tokens of a byte-level vocabulary are normal
        odd = {token_id for token_id, token_type in enumerate(types) if token_type != NORMAL}
        checked = sorted(set(checked) & (odd | added_tokens.keys()) | set(checked) - known.keys())
    for token_id in checked:
        token_type, text = types[token_id], texts[token_id]
        if token_id in added_tokens:
            token = added_tokens[token_id]
            allowed = {CONTROL if token.special or _LOOKS_LIKE_CONTROL.fullmatch(token.text) else USER_DEFINED}
            # The SentencePiece model may contain a more specific type than tokenizer.json.
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
        if token_type not in allowed:
            wrong.append(f"token {token_id} ({text!r:.60}): expected token type {min(allowed)}, found {token_type}")
    detail = f"{len(types)} token types match the tokenizer" if not wrong else wrong[0]
    return Check(name="token types", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    model = content["model"]
    return model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")


def _check_merges(merges: Sequence[str], content: Mapping[str, Any]) -> Check:
    """Check that the GGUF contains the BPE merges of the tokenizer in the same order.

    The order of BPE merges determines how a text is split into tokens.
    """
    pairs = content["model"].get("merges") or []
    if pairs and isinstance(pairs[0], str):
        pairs = [pair.split(" ", 1) for pair in pairs]
    wanted = [" ".join(pair) for pair in pairs]
    if wanted != merges:
        # A space separates the two tokens of a merge. Byte-level vocabularies write a space inside a token as U+0120.
        wanted = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in pairs]
    rank = next(
        (number for number, (expected, merge) in enumerate(zip(wanted, merges, strict=False)) if expected != merge),
        None,
    )
    if rank is not None:
        detail = f"merge {rank}: expected {wanted[rank]!r:.60}, found {merges[rank]!r:.60}"
    else:
        detail = f"{len(merges)} merges match the tokenizer"
    if len(wanted) != len(merges):
        detail = f"expected {len(wanted)} merges, found {len(merges)}"
    return Check(name="merges", passed=list(merges) == wanted, detail=detail)


def _check_template(gguf: GgufModel, reference: Reference) -> Check:
    """Check that the GGUF has the chat templates of the tuned model, with equal names and equal texts.

    An empty template may be missing, because llama.cpp treats an empty template like a missing template.
    """
    prefix = "tokenizer.chat_template"
    stored = {
        key.removeprefix(prefix).removeprefix(".") or "default": value
        for key, value in gguf.metadata.items()
        if key == prefix or key.startswith(f"{prefix}.")
    }
    wanted = {stored_name(name): text for name, text in reference.templates.items()}
    wrong = [
        f"chat template {name}: expected {'the template of the tuned model' if name in wanted else 'no template'}, "
        f"found {'no template' if name not in stored else 'a different text' if name in wanted else 'a template'}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name, "") != wanted.get(name, "")
    ]
    detail = wrong[0] if wrong else f"{len(stored)} chat templates match the tuned model's chat templates"
    return Check(name="chat template", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
