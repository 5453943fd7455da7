"""Read the pieces, scores and types of a SentencePiece tokenizer (BPE or unigram).

For SentencePiece BPE, llama.cpp does not use merges: llama.cpp joins two neighbouring pieces if their concatenation is
also a piece, and first joins the pair whose concatenation has the highest score. A tokenizer.json contains merges but
no scores. The score of a piece is therefore computed as minus the rank of the first merge that produces the piece. The
computed score equals the score in the original tokenizer.model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotExpressible, UnreadableFile
from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab.byte_level import read_merges
from exporter.formats.gguf.vocab.spaces import UNMAPPED, Spaces, read_spaces
from exporter.formats.gguf.vocab.tokens import AddedToken, TokenTable, normalised_notes
from exporter.formats.gguf.writer import Key
from exporter.sources.hf.sentencepiece import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_model,
)

_BYTE_PIECE: Final = re.compile("<0x([0-9A-F]{2})>")
#: Algorithm → tokenizer.ggml.model.
_MODEL: Final = {BPE: "llama", UNIGRAM: "t5"}
_UNSUPPORTED: Final = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
_INSTEAD: Final = "use --to hf or --to onnx to export this model"


def sentencepiece_keys(
    files: Mapping[str, Path],
    content: Mapping[str, Any],
    added: Sequence[AddedToken],
    rows: int,
    *,
    state_prefix: bool = False,
    class_spaces: Mapping[str, Any] | None = None,
) -> tuple[list[Key], list[str], str, dict[str, int]]:
    """Convert a SentencePiece tokenizer to GGUF metadata.

    Returns (GGUF keys, notes, value of the key tokenizer.ggml.model, ids of control pieces).
    content: the parsed tokenizer.json, or {} if the file is absent. state_prefix: whether to write the key
    add_space_prefix even if its value is llama.cpp's default. class_spaces: the normalizer and the pre-tokenizer of the
    tokenizer class, if they replace those of the file.
    Raises NotExpressible for tokenizer features that llama.cpp does not support, UnreadableFile for a broken file, and
    BadInput for token ids that are not below ``rows``.
    """
    stored = read_model(files["tokenizer.model"]) if "tokenizer.model" in files else None
    source = files["tokenizer.model" if stored else "tokenizer.json"]
    notes: list[str] = []
    model = stored or _from_json(source, content, added, notes)
    if model.algorithm not in _MODEL:
        raise NotExpressible(
            f"gguf: {source}", "SentencePiece models of the types word and char are not supported", instead=_INSTEAD
        )
    table = TokenTable(rows, source, byte_level=False)
    table.check_ids([len(model.texts) - 1, *(token.id for token in added)])
    for token_id, (text, score, type_) in enumerate(zip(model.texts, model.scores, model.types, strict=True)):
        if type_:
            table.put(token_id, text.replace("\u2581", " ") if type_ == USER_DEFINED else text, type_, score)
    for token in added:
        # A token of tokenizer.model keeps its type if tokenizer.json only repeats the token (as in llama.cpp's
        # converter).
        known = stored and not token.stated and token.id < len(model.texts) and model.texts[token.id] == token.text
        if not known or model.types[token.id] == NORMAL:
            table.add(token)
    _check_bytes(table, model.algorithm)
    spaces = _spaces(source, files, {**content, **(class_spaces or {})}, model)
    keys = [
        writer.text("tokenizer.ggml.model", _MODEL[model.algorithm]),
        writer.text("tokenizer.ggml.pre", "default"),
        writer.texts("tokenizer.ggml.tokens", table.complete()),
        writer.f32s("tokenizer.ggml.scores", table.scores),
        writer.i32s("tokenizer.ggml.token_type", table.types),
        *_space_keys(spaces, model.algorithm, state_prefix),
    ]
    notes += spaces.notes
    if content.get("normalizer"):
        notes += normalised_notes(token for token in added if not token.special)
    named = {text: token_id for token_id, text in enumerate(model.texts) if model.types[token_id] in (CONTROL, UNKNOWN)}
    return keys, notes, _MODEL[model.algorithm], named


def _from_json(
    path: Path, content: Mapping[str, Any], added: Sequence[AddedToken], notes: list[str]
) -> SentencePieceModel:
    """Convert the pieces of a tokenizer.json to the structure of a tokenizer.model.

    A token id that has no piece gets the piece type 0. Notes on differences between transformers and llama.cpp are
    appended to the list ``notes``.
    """
    model = content["model"]
    if model.get("type") == "Unigram":
        return _unigram(path, model)
    vocab, fallback, unknown = model.get("vocab"), bool(model.get("byte_fallback")), model.get("unk_token")
    if not isinstance(vocab, dict) or not all(type(token_id) is int and token_id >= 0 for token_id in vocab.values()):
        raise UnreadableFile(path, f"model.vocab: expected an object that maps tokens to ids, found {vocab!r:.80}")
    if unsupported := [key for key in _UNSUPPORTED if model.get(key)]:
        reason = f"llama.cpp's SentencePiece BPE does not support {' and '.join(unsupported)}"
        raise NotExpressible(f"gguf: {path}", reason, instead=_INSTEAD)
    out = SentencePieceModel(algorithm=BPE)
    size = max(vocab.values(), default=-1) + 1
    if size > 2 * len(vocab) + (1 << 16):
        raise UnreadableFile(path, f"model.vocab: expected token ids without large gaps, found id {size - 1}")
    out.texts, out.scores, out.types = [""] * size, [0.0] * size, [0] * size
    merges = dict.fromkeys(read_merges(path, model.get("merges")))
    joined = dict.fromkeys(left + right for left, right in merges)
    notes += _merge_notes(merges, joined, vocab.keys() - {token.text for token in added})
    ranks = {text: rank for rank, text in enumerate(joined)}
    for text, token_id in sorted(vocab.items(), key=lambda item: item[1]):
        type_ = UNKNOWN if text == unknown else BYTE if fallback and _BYTE_PIECE.fullmatch(text) else NORMAL
        out.texts[token_id], out.types[token_id] = text, type_
        if type_ == NORMAL:
            # Pieces without a merge (single characters) get the lowest scores; llama.cpp never compares those scores.
            out.scores[token_id] = -float(ranks.setdefault(text, len(ranks)))
    return out


def _unigram(path: Path, model: Mapping[str, Any]) -> SentencePieceModel:
    pieces, unknown = model.get("vocab"), model.get("unk_id")
    if not isinstance(pieces, list):
        raise UnreadableFile(path, f"model.vocab: expected a list of pieces with scores, found {pieces!r:.80}")
    out = SentencePieceModel(algorithm=UNIGRAM)
    for piece in pieces:
        if not isinstance(piece, list) or len(piece) != 2 or not isinstance(piece[0], str):
            raise UnreadableFile(path, f"model.vocab: expected a pair of a piece and a score, found {piece!r:.80}")
        if isinstance(piece[1], bool) or not isinstance(piece[1], int | float):
            raise UnreadableFile(path, f"model.vocab: {piece[0]!r}: expected a score, found {piece[1]!r:.80}")
        out.texts.append(piece[0])
        out.scores.append(float(piece[1]))
        out.types.append(NORMAL)
    if type(unknown) is not int or not 0 <= unknown < len(pieces):
        raise NotExpressible(
            f"gguf: {path}",
            f"llama.cpp requires a piece for unknown tokens, but the unigram model has unk_id {unknown!r:.80}",
            instead=_INSTEAD,
        )
    out.types[unknown] = UNKNOWN
    if model.get("byte_fallback"):
        out.types = [
            BYTE if _BYTE_PIECE.fullmatch(text) else type_ for text, type_ in zip(out.texts, out.types, strict=True)
        ]
    return out


def _check_bytes(table: TokenTable, algorithm: int) -> None:
    """Check that llama.cpp supports the set of byte pieces in a SentencePiece model.

    llama.cpp requires all 256 byte pieces (<0x00> to <0xFF>) in a BPE model, and does not support byte pieces in a
    unigram model.
    """
    present = {text for text, type_ in zip(table.texts, table.types, strict=True) if type_ == BYTE}
    if algorithm == UNIGRAM:
        if present:
            raise NotExpressible(
                f"gguf: {table.source}",
                "the unigram model has byte fallback, but llama.cpp would turn the bytes into unknown tokens",
                instead=_INSTEAD,
            )
        return
    texts = set(table.texts)
    absent = [
        byte for byte in range(256) if f"<0x{byte:02X}>" not in present and (byte > 127 or chr(byte) not in texts)
    ]
    if absent:
        raise NotExpressible(
            f"gguf: {table.source}",
            "llama.cpp requires a piece for every byte, "
            f"but the SentencePiece BPE lacks {len(absent)} of the 256 byte pieces, such as <0x{absent[0]:02X}>",
            instead=_INSTEAD,
        )


def _spaces(source: Path, files: Mapping[str, Path], content: Mapping[str, Any], model: SentencePieceModel) -> Spaces:
    """Determine whether a SentencePiece tokenizer adds a space before a text and merges runs of spaces.

    The treatment of spaces is read from tokenizer.json, as in transformers, or, if tokenizer.json does not exist, from
    tokenizer.model.
    """
    unigram = model.algorithm == UNIGRAM
    if content:
        spaces = read_spaces(content, str(files.get("tokenizer.json", source)), unigram=unigram)
        return replace(spaces, charsmap=model.charsmap) if unigram and not spaces.charsmap else spaces
    if model.treat_whitespace_as_suffix:
        reason = "treat_whitespace_as_suffix: llama.cpp can treat a space only as the prefix of a word"
        raise NotExpressible(f"gguf: {source}", reason, instead=_INSTEAD)
    if unigram:
        return Spaces(model.add_dummy_prefix, model.remove_extra_whitespaces, model.charsmap)
    notes = []
    if model.charsmap:
        notes.append(UNMAPPED)
    if model.remove_extra_whitespaces:
        notes.append("llama.cpp keeps runs of spaces, but this tokenizer merges each run into a single space")
    return Spaces(model.add_dummy_prefix, notes=tuple(notes))


def _space_keys(spaces: Spaces, algorithm: int, state_prefix: bool) -> list[Key]:
    prefix = writer.truth("tokenizer.ggml.add_space_prefix", spaces.prefix)
    if algorithm == BPE:
        return [prefix] if state_prefix or not spaces.prefix else []
    keys = [prefix, writer.truth("tokenizer.ggml.remove_extra_whitespaces", spaces.merged)]
    if spaces.charsmap:
        keys.append(writer.bytes8("tokenizer.ggml.precompiled_charsmap", spaces.charsmap))
    return keys


def _merge_notes(merges: Collection[tuple[str, str]], joined: Iterable[str], vocab: Collection[str]) -> list[str]:
    """Return a note if the concatenation of two pieces is in the vocabulary, but the pair is not in ``merges``.

    llama.cpp joins two neighbouring pieces even if there is no merge for the pair, but transformers does not. vocab:
    the pieces without added tokens, because added tokens are matched before the text is tokenised.
    """
    for text in joined:
        for length in range(1, len(text)):
            left, right = text[:length], text[length:]
            if (left, right) not in merges and left in vocab and right in vocab:
                return [
                    f"llama.cpp joins {left!r} and {right!r} into a token, but this tokenizer has no merge for the pair"
                ]
    return []
