"""A byte-level BPE tokenizer as GGUF metadata: tokens, their types, merges, the pre-tokenizer's name.

Read from tokenizer.json alone. The other kinds (SentencePiece, unigram, WordPiece) are not written by this version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible, UnreadableFile
from exporter.formats.gguf import pre_tokenizers, writer
from exporter.formats.gguf.special_tokens import special_keys
from exporter.formats.gguf.writer import Key
from exporter.sources.checkpoint import read_json

#: Token types. Source: enum llama_token_type in llama.h.
NORMAL: Final = 1
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5

_MAX_TOKENIZER_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Keys for the header, and what the format cannot say about this tokenizer."""

    keys: Sequence[Key]
    notes: Sequence[str]


def vocabulary(
    files: Mapping[str, Path], config: Mapping[str, Any], vocab: int, *, where: Path, pre_tokenizer: str | None
) -> Vocabulary:
    """The tokenizer's metadata for a model of ``vocab`` rows.

    files: tokenizer files by name. pre_tokenizer: the name to write instead of the recognised one.
    Raises NotExpressible for other kinds of tokenizers and unknown splittings, BadInput for a broken one.
    """
    path = _tokenizer_json(files, where)
    content = read_json(path, max_nbytes=_MAX_TOKENIZER_BYTES)
    model = _bpe_model(path, content)
    notes = list(_normalizer_notes(path, content.get("normalizer")))
    added = added_tokens(path, content)
    tokens, types = _tokens(path, model["vocab"], added, vocab)
    notes += _flag_notes(added)
    name = pre_tokenizer or pre_tokenizers.recognise(content, config.get("model_type"), str(path))
    settings = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    keys = []
    if isinstance(prefix := settings.get("add_prefix_space"), bool):
        keys.append(writer.truth("tokenizer.ggml.add_space_prefix", prefix))
    keys += [
        writer.text("tokenizer.ggml.model", "gpt2"),
        writer.text("tokenizer.ggml.pre", name),
        writer.texts("tokenizer.ggml.tokens", tokens),
        writer.i32s("tokenizer.ggml.token_type", types),
    ]
    if merges := _merges(path, model.get("merges")):
        keys.append(writer.texts("tokenizer.ggml.merges", merges))
    keys += special_keys(files, config, content, settings, {token["content"]: token["id"] for token in added}, vocab)
    return Vocabulary(keys, notes)


def _tokenizer_json(files: Mapping[str, Path], where: Path) -> Path:
    if "tokenizer.model" in files:
        raise NotExpressible(
            f"gguf: {files['tokenizer.model']}",
            "SentencePiece tokenizers are not written by this version",
            instead="merge with --to hf and convert the result with llama.cpp's own converter",
        )
    if "tokenizer.json" not in files:
        raise UnreadableFile(where / "tokenizer.json", "a GGUF holds its tokenizer: expected the file, found none")
    return files["tokenizer.json"]


def _bpe_model(path: Path, content: Mapping[str, Any]) -> Mapping[str, Any]:
    model = content.get("model")
    if not isinstance(model, dict):
        raise UnreadableFile(path, f"model: expected a table, found {model!r:.80}")
    kind = model.get("type", "BPE" if "merges" in model else None)
    odd = [
        key for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)
    ]
    if kind != "BPE" or odd:
        what = f"BPE with {' and '.join(odd)}" if kind == "BPE" else str(kind)
        raise NotExpressible(
            f"gguf: {path}",
            f"{what} tokenizers are not written by this version (byte-level BPE is)",
            instead="merge with --to hf and convert the result with llama.cpp's own converter",
        )
    table = model.get("vocab")
    if not isinstance(table, dict) or not all(type(token_id) is int for token_id in table.values()):
        raise UnreadableFile(path, f"model.vocab: expected a table of token to id, found {table!r:.80}")
    return model


def _normalizer_notes(path: Path, normalizer: Any) -> Sequence[str]:
    kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
    if kind is None:
        return ()
    if kind != "NFC":
        raise NotExpressible(
            f"gguf: {path}",
            f"normalizer {kind!r:.80}: llama.cpp does not normalise the text of a byte-level BPE",
            instead="remove the normalizer, or convert with llama.cpp's own converter after --to hf",
        )
    return ("normalizer NFC: llama.cpp leaves it out, so text that is not composed gives other tokens",)


def added_tokens(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``added_tokens`` of the parsed tokenizer.json at ``path``. Raises UnreadableFile for broken ones."""
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise UnreadableFile(path, f"added_tokens: expected a list, found {added!r:.80}")
    for token in added:
        if not isinstance(token, dict) or type(token.get("id")) is not int or not isinstance(token.get("content"), str):
            raise UnreadableFile(path, f"added_tokens: expected tokens with id and content, found {token!r:.80}")
    return added


def _flag_notes(added: Sequence[Mapping[str, Any]]) -> list[str]:
    """Flags that llama.cpp has no place for. They change how text around such a token is split."""
    notes = []
    for flag in ("lstrip", "rstrip", "single_word"):
        if names := [str(token["content"]) for token in added if token.get(flag)]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            notes.append(f"added token {names[0]!r}{more}: {flag} has no place in a GGUF")
    return notes


def _tokens(
    path: Path, table: Mapping[str, int], added: Sequence[Mapping[str, Any]], vocab: int
) -> tuple[list[str], list[int]]:
    """Texts and types by id. Rows of the matrix that no token names become ``[PAD{id}]``, unused."""
    texts: list[str | None] = [None] * vocab
    types = [UNUSED] * vocab
    highest = max([*table.values(), *(token["id"] for token in added)], default=-1)
    lowest = min([*table.values(), *(token["id"] for token in added)], default=0)
    if highest >= vocab or lowest < 0:
        found = lowest if lowest < 0 else highest
        raise BadInput(f"{path}: expected token ids below {vocab} (rows of the embedding), found {found}")
    for token, token_id in table.items():
        texts[token_id] = token
        types[token_id] = NORMAL
    for entry in added:
        content, token_id = entry["content"], entry["id"]
        if table.get(content, token_id) != token_id:
            raise BadInput(f"{path}: {content!r}: expected one id, found {table[content]} and {token_id}")
        texts[token_id], types[token_id] = as_added(entry)
    complete = [f"[PAD{token_id}]" if token is None else token for token_id, token in enumerate(texts)]
    if len(set(complete)) != vocab or "" in complete:
        # llama.cpp ends the process on such a file.
        twice, count = Counter(complete).most_common(1)[0]
        found = f"{twice!r} {count} times" if count > 1 else "an empty token"
        raise NotExpressible(f"gguf: {path}", f"llama.cpp needs every token to have a text of its own, found {found}")
    return complete, types


def as_added(entry: Mapping[str, Any]) -> tuple[str, int]:
    """Text and type of an added token."""
    content = str(entry["content"])
    if entry.get("special") or _looks_special(content):
        return content, CONTROL
    # llama.cpp looks for these in the text as it comes, so SentencePiece's mark must be a space already.
    return content.replace("\u2581", " "), USER_DEFINED


def _looks_special(token: str) -> bool:
    """Tokens that are control tokens by their looks, whatever their flag says: llama.cpp's converter has this rule."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<\uff5c") and token.endswith("\uff5c>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _merges(path: Path, merges: Any) -> list[str]:
    """``"left right"`` each, from either form of tokenizer.json; a space inside a part becomes its byte symbol."""
    if not merges:
        return []
    if isinstance(merges, list):
        if all(isinstance(pair, str) for pair in merges):
            return merges
        try:
            return [f"{left} {right}" if " " not in left + right else _escaped(left, right) for left, right in merges]
        except (TypeError, ValueError):
            pass
    raise UnreadableFile(path, f"model.merges: expected a list of pairs, found {merges!r:.80}")


def _escaped(left: str, right: str) -> str:
    return f"{left.replace(' ', chr(0x120))} {right.replace(' ', chr(0x120))}"
