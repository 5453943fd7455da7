"""The vocabulary of an existing GGUF beside the tokenizer that an adapter brings: which entries change.

Only what the adapter's tokenizer adds is touched: texts, types and scores of new tokens, in unused rows first, then
beyond; ids of special tokens and chat templates where they differ. Merges and all other tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, NotExpressible, TensorMismatch, UnreadableFile
from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab.special_tokens import special_keys
from exporter.formats.gguf.vocab.templates import template_keys
from exporter.formats.gguf.vocab.tokens import ADDED_SCORE, PADDING_SCORE, added_tokens
from exporter.formats.gguf.writer import Key
from exporter.io.json_objects import read_object
from exporter.merge.vocabulary.files import adapter_files
from exporter.patch.gguf.header import numbers, same_kind
from exporter.patch.gguf.rows import EMBEDDING, HEAD
from exporter.patch.rows import Wanted
from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.hf.sentencepiece import CONTROL, NORMAL, UNUSED, USER_DEFINED
from exporter.sources.hf.tokenizer import read_tokenizer
from exporter.sources.peft.adapter import Adapter

TOKENS: Final = "tokenizer.ggml.tokens"
TYPES: Final = "tokenizer.ggml.token_type"
SCORES: Final = "tokenizer.ggml.scores"
#: Values of tokenizer.ggml.model whose special tokens are described.
_MODELS: Final = ("gpt2", "llama", "t5")


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the matrices after patching, the keys that change, and the texts of tokens that are new to the file.

    states_bos: the adapter's tokenizer says whether texts begin with a token.
    """

    size: int
    changes: Sequence[Key]
    new: Mapping[int, str]
    states_bos: bool


def patch_vocabulary(
    parts: GgufModel, keys: Mapping[str, Key], adapters: Sequence[Adapter], wanted: Wanted
) -> Vocabulary:
    """Decide on the vocabulary. ``keys``: the file's, by name.

    Raises TensorMismatch for rows of tokens that neither file nor tokenizer has, BadInput for a tokenizer that
    contradicts the file or new rows that nobody sets.
    """
    files = adapter_files(adapters)
    rows = parts.tensors[EMBEDDING].shape[0]
    content = read_tokenizer(files["tokenizer.json"]) if "tokenizer.json" in files else {}
    settings = read_object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    added = {token.id: token.stored for token in added_tokens(files, content, settings)}
    known = max(added, default=-1) + 1
    size = max(rows, wanted.highest + 1)
    if wanted.highest_trained >= max(rows, known):
        part = wanted.where[next(iter(wanted.where))]
        hint = "new tokens need the tokenizer that names them beside the adapter"
        expected = f"token ids below {max(rows, known)} (rows of {EMBEDDING})"
        raise TensorMismatch(part.path, part.key, expected=expected, found=wanted.highest_trained, hint=hint)
    if known > size:
        raise BadInput(
            f"{files['tokenizer.json']}: expected token ids below {size} (rows and new rows), found {known - 1}"
        )
    _require_covered(parts, wanted, size)
    new, changes = _entries(parts, added, size, files.get("tokenizer.json"))
    counts = [name for name, value in parts.metadata.items() if name.endswith(".vocab_size") and type(value) is int]
    changes += [same_kind(keys[name], size) for name in counts if size != rows]
    ids = {text: token_id for token_id, (text, _) in added.items()}
    specials: list[Key] = []
    if files and (model := parts.metadata.get("tokenizer.ggml.model")) in _MODELS:
        specials, _ = special_keys(files, ({}, {}), content, settings, ids, size, model)
        specials += template_keys(files, settings)
    # Whether texts get a first or last token is left as it is: it hangs on more than the tokenizer's files.
    changes += [key for key in specials if not key.name.startswith("tokenizer.ggml.add_") and keys.get(key.name) != key]
    return Vocabulary(size, changes, new, any(key.name == "tokenizer.ggml.add_bos_token" for key in specials))


def _require_covered(parts: GgufModel, wanted: Wanted, size: int) -> None:
    """Every matrix grows, and every new row of each must come from an adapter."""
    names = [name for name in (EMBEDDING, HEAD) if name in parts.tensors]
    for name in names:
        wanted.require_covered(parts.path, name, parts.tensors[name].shape[0], size)
    old = parts.tensors[EMBEDDING].shape[0]
    for name, tensor in parts.tensors.items():
        if size != old and name not in names and old in tensor.shape and name.startswith(("output", "per_layer_token")):
            raise NotExpressible(
                f"{parts.path}: {name}",
                f"the vocabulary grows from {old} to {size}, and no adapter holds new entries of this tensor",
                instead="resize the base with transformers, train on that and export it",
            )


def _entries(
    parts: GgufModel, added: Mapping[int, tuple[str, int]], size: int, tokenizer: Path | None
) -> tuple[dict[int, str], list[Key]]:
    """Texts of new tokens, and the arrays with them, each in the type that it has."""
    arrays = {name: parts.metadata.get(name) for name in (TOKENS, TYPES, SCORES)}
    stored = arrays[TOKENS]
    if not isinstance(stored, GgufArray):
        if size == parts.tensors[EMBEDDING].shape[0]:
            return {}, []
        raise NotExpressible(f"{parts.path}", f"new tokens, and the file has no {TOKENS} to name them in")
    if not added and size <= stored.count:
        return {}, []
    for name, array in arrays.items():
        if isinstance(array, GgufArray) and array.count != stored.count:
            raise UnreadableFile(
                parts.path, f"{name}: expected {stored.count} entries, one a token, found {array.count}"
            )
    texts = stored.values()
    types = arrays[TYPES].values() if isinstance(arrays[TYPES], GgufArray) else [NORMAL] * len(texts)
    places = {text: token_id for token_id, text in enumerate(texts)}
    held = len(texts)
    texts += [f"[PAD{token_id}]" for token_id in range(held, size)]
    types += [UNUSED] * (size - held)
    new: dict[int, str] = {}
    retyped = False
    for token_id, (text, kind) in sorted(added.items()):
        if texts[token_id] == text:
            if types[token_id] == NORMAL and kind in (CONTROL, USER_DEFINED):
                types[token_id], retyped = kind, True  # a plain token of the base that the tokenizer now never splits
            continue
        if types[token_id] != UNUSED:
            found = f"{texts[token_id]!r} in {parts.path}"
            raise BadInput(f"{tokenizer}: token {token_id}: expected the base's vocabulary, {text!r} is {found}")
        if text in places:
            raise BadInput(
                f"{tokenizer}: {text!r}: expected a token that is new, found it as {places[text]} in the file"
            )
        texts[token_id], types[token_id], new[token_id] = text, kind, text
    if not new and not retyped and size == held:
        return {}, []
    changes = [writer.texts(TOKENS, texts)] if new or size > held else []
    if isinstance(kinds := arrays[TYPES], GgufArray):
        changes.append(numbers(TYPES, kinds.item_type, types))
    if isinstance(scores := arrays[SCORES], GgufArray) and changes:
        values = [*scores.values(), *[PADDING_SCORE] * (size - held)]
        for token_id in new:
            values[token_id] = ADDED_SCORE
        changes.append(numbers(SCORES, scores.item_type, values))
    return new, changes


#: Where a key that the file lacks belongs: the order of llama.cpp's converter.
ORDER: Final = (
    TOKENS,
    SCORES,
    TYPES,
    "tokenizer.ggml.merges",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_sep_token",
    "tokenizer.chat_template",
)
