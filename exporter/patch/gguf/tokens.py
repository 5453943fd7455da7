"""Plans the vocabulary changes of a GGUF file by comparing the file's vocabulary with an adapter's tokenizer.

A patch adds the texts, types and scores of tokens that only the adapter's tokenizer contains. New tokens are assigned
to existing padding rows first, and further rows are appended if needed. A patch also updates special token ids and chat
templates to match the adapter's tokenizer. A reserved token is renamed if its row is trained. A patch does not change
BPE merges or the texts of other existing tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, NotExpressible, UnreadableFile
from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab.added_tokens import added_tokens
from exporter.formats.gguf.vocab.special_tokens import special_keys
from exporter.formats.gguf.vocab.templates import NAMES as TEMPLATE_NAMES
from exporter.formats.gguf.vocab.templates import TEMPLATE, template_keys
from exporter.formats.gguf.vocab.tokens import ADDED_SCORE, PADDING_SCORE, with_rows
from exporter.formats.gguf.writer import Key
from exporter.io.json_objects import read_object
from exporter.merge.vocabulary.files import adapter_files
from exporter.merge.vocabulary.templates import chat_templates
from exporter.patch.gguf.header import number_array, with_value
from exporter.patch.gguf.vocab_tensors import EMBEDDING, HEAD
from exporter.patch.rows import RowEdits, patched_vocab
from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.hf.sentencepiece import CONTROL, NORMAL, UNUSED, USER_DEFINED
from exporter.sources.hf.tokenizer import read_tokenizer
from exporter.sources.peft.adapter import Adapter

TOKENS: Final = "tokenizer.ggml.tokens"
TYPES: Final = "tokenizer.ggml.token_type"
SCORES: Final = "tokenizer.ggml.scores"
#: Values of tokenizer.ggml.model for which ttexport can write the keys of the special tokens.
_MODELS: Final = ("gpt2", "llama", "t5")


@dataclass(frozen=True)
class PatchedVocabulary:
    """The vocabulary of a GGUF file after patching.

    size: number of rows of the embedding. changes: header keys with new values. new_tokens: the tokens that the patch
    adds to the file, as a dict from token id to text. states_bos: whether the adapter's tokenizer contains a setting
    for adding a BOS token. removed: names of header keys that the patch removes. order: names of header keys in the
    order of llama.cpp's converter, which gives the place of a new key.
    """

    size: int
    changes: Sequence[Key]
    new_tokens: Mapping[int, str]
    states_bos: bool
    removed: Set[str]
    order: Sequence[str]


def patch_vocabulary(
    model: GgufModel, keys: Mapping[str, Key], adapters: Sequence[Adapter], edits: RowEdits
) -> PatchedVocabulary:
    """Plan the vocabulary of a GGUF file after patching. keys: the header keys of the file by name.

    Raises TensorMismatch if a trained row belongs to a token that neither the file nor the tokenizer contains. Raises
    BadInput if the tokenizer contradicts the file, or if no adapter contains the values of an appended row. Raises
    NotExpressible if the vocabulary grows and the file lacks a token list or contains an additional tensor with one
    entry per token.
    """
    files = adapter_files(adapters)
    n_rows = model.tensors[EMBEDDING].shape[0]
    content = read_tokenizer(files["tokenizer.json"]) if "tokenizer.json" in files else {}
    settings = read_object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    tokens = added_tokens(files, content, settings)
    tokenizer = files.get("tokenizer.json")
    n_tokens = max((token.id for token in tokens if token.listed or token.stated), default=-1) + 1
    size = patched_vocab([edits], n_rows, n_tokens, tokenizer=tokenizer, rows_in=EMBEDDING)
    _require_covered(model, edits, size)
    byte_level = model.metadata.get("tokenizer.ggml.model") == "gpt2"
    added = {token.id: token.stored(byte_level=byte_level) for token in with_rows(tokens, size)[0]}
    ids_of_roles = [value for name, value in model.metadata.items() if name.endswith("_token_id")]
    roles = {value for value in ids_of_roles if type(value) is int}
    new, changes = _token_arrays(model, added, size, tokenizer, edits.trained - roles)
    if size != n_rows:
        sizes = [name for name, value in model.metadata.items() if name.endswith(".vocab_size") and type(value) is int]
        changes += [with_value(keys[name], size) for name in sizes]
    ids = {text: token_id for token_id, (text, _) in added.items()}
    specials: list[Key] = []
    if files and (tokenizer_model := model.metadata.get("tokenizer.ggml.model")) in _MODELS:
        specials, _ = special_keys(files, ({}, {}), content, settings, ids, size, tokenizer_model)
    # The settings for a first or last token of every text stay, because the tokenizer's files alone do not determine
    # these settings.
    changes += [key for key in specials if not key.name.startswith("tokenizer.ggml.add_") and keys.get(key.name) != key]
    states_bos = any(key.name == "tokenizer.ggml.add_bos_token" for key in specials)
    templates, removed = _templates(keys, files)
    order = [*ORDER, *(key.name for key in templates)]
    return PatchedVocabulary(size, [*changes, *templates], new, states_bos, removed, order)


def _templates(keys: Mapping[str, Key], files: Mapping[str, Path]) -> tuple[list[Key], Set[str]]:
    """Return (keys of the adapters' chat templates, names of the file's keys of chat templates).

    The adapters' chat templates replace all chat templates of the file, as in a merge. Nothing is returned if the
    adapters have no chat templates, or if the file has the same chat templates.
    """
    new = template_keys(chat_templates(files) or {})
    old = {name for name in keys if name in (TEMPLATE, TEMPLATE_NAMES) or name.startswith(f"{TEMPLATE}.")}
    unchanged = {key.name: key for key in new} == {name: keys[name] for name in old}
    return ([], frozenset()) if unchanged or not new else (new, old)


def _require_covered(model: GgufModel, edits: RowEdits, size: int) -> None:
    """Check that the adapters contain every row that is appended, for each tensor with one row per token."""
    names = [name for name in (EMBEDDING, HEAD) if name in model.tensors]
    for name in names:
        edits.require_covered(model.path, name, model.tensors[name].shape[0], size)
    old = model.tensors[EMBEDDING].shape[0]
    for name, tensor in model.tensors.items():
        if size != old and name not in names and old in tensor.shape and name.startswith(("output", "per_layer_token")):
            raise NotExpressible(
                f"{model.path}: {name}",
                f"the vocabulary grows from {old} to {size}, but no adapter contains new values for this tensor",
                instead="resize the base with transformers, train on the resized base and export the result",
            )


def _token_arrays(
    model: GgufModel, added: Mapping[int, tuple[str, int]], size: int, tokenizer: Path | None, renamable: Set[int]
) -> tuple[dict[int, str], list[Key]]:
    """Return (dict from the ids of new tokens to texts, new header keys for the token list, types and scores).

    renamable: as in ``_add_tokens``. Only arrays that change are returned; a changed array keeps its GGUF item type.
    """
    values = {name: model.metadata.get(name) for name in (TOKENS, TYPES, SCORES)}
    arrays = {name: value for name, value in values.items() if isinstance(value, GgufArray)}
    if TOKENS not in arrays:
        if size == model.tensors[EMBEDDING].shape[0]:
            return {}, []
        raise NotExpressible(
            f"{model.path}", f"the adapter adds tokens, but the file has no array {TOKENS} to add the tokens to"
        )
    count = arrays[TOKENS].count
    if not added and size <= count:
        return {}, []
    for name, array in arrays.items():
        if array.count != count:
            raise UnreadableFile(model.path, f"{name}: expected {count} items, one per token, found {array.count}")
    texts = arrays[TOKENS].values() + [f"[PAD{token_id}]" for token_id in range(count, size)]
    types = arrays[TYPES].values() if TYPES in arrays else [NORMAL] * count
    types += [UNUSED] * (size - count)
    byte_level = model.metadata.get("tokenizer.ggml.model") == "gpt2"
    new, retyped = _add_tokens(texts, types, added, model.path, tokenizer, renamable, byte_level=byte_level)
    if not new and not retyped and size == count:
        return {}, []
    changes = [writer.texts(TOKENS, texts)] if new or size > count else []
    if TYPES in arrays:
        changes.append(number_array(TYPES, arrays[TYPES].item_type, types))
    if SCORES in arrays and changes:
        scores = [*arrays[SCORES].values(), *[PADDING_SCORE] * (size - count)]
        for token_id in new:
            scores[token_id] = ADDED_SCORE
        changes.append(number_array(SCORES, arrays[SCORES].item_type, scores))
    return new, changes


def _add_tokens(
    texts: list[str],
    types: list[int],
    added: Mapping[int, tuple[str, int]],
    path: Path,
    tokenizer: Path | None,
    renamable: Set[int],
    *,
    byte_level: bool,
) -> tuple[dict[int, str], bool]:
    """Insert the tokenizer's ``added`` tokens into the vocabulary lists ``texts`` and ``types``.

    Returns (dict from the ids of new or renamed tokens to texts, whether the type of an existing token changed).
    renamable: ids of the tokens that may get another text, if the token is an added token of the file: the adapters
    train the token's row, and the token has no role, such as the end of a text. Raises BadInput if an added token would
    replace a different token. Raises NotExpressible if two tokens would have the same text, or a token no text.
    """
    new: dict[int, str] = {}
    retyped = False
    for token_id, (text, token_type) in sorted(added.items()):
        if texts[token_id] == text:
            if types[token_id] == NORMAL and token_type in (CONTROL, USER_DEFINED):
                # The adapter's tokenizer has this normal token of the file as an added token, which is never split.
                _require_ascii(text, token_id, path, byte_level=byte_level)
                types[token_id], retyped = token_type, True
            continue
        renamed = types[token_id] in (CONTROL, USER_DEFINED) and token_id in renamable
        if types[token_id] != UNUSED and not renamed:
            raise BadInput(
                f"{tokenizer}: token {token_id}: expected the text {texts[token_id]!r} as in {path}, found {text!r}"
            )
        texts[token_id], types[token_id], new[token_id] = text, token_type, text
    _require_unique(texts, new, path, tokenizer)
    return new, retyped


def _require_unique(texts: Sequence[str], new: Mapping[int, str], path: Path, tokenizer: Path | None) -> None:
    """Refuse duplicate and empty token texts, because llama.cpp aborts when it loads such a file.

    Raises NotExpressible.
    """
    ids: dict[str, int] = {}
    for token_id, text in enumerate(texts):
        first = ids.setdefault(text, token_id)
        if text and first == token_id:
            continue
        where, other = (token_id, first) if token_id in new or first not in new else (first, token_id)
        actual = f"{text!r}, which is also the text of token {other}" if text else "an empty text"
        raise NotExpressible(
            f"{tokenizer if where in new else path}: token {where}",
            f"llama.cpp needs unique, non-empty tokens, found {actual}",
        )


def _require_ascii(text: str, token_id: int, path: Path, *, byte_level: bool) -> None:
    """Refuse to turn bytes into an added token, because llama.cpp would print the text of the token for the bytes.

    A byte-level BPE writes the byte 0xE4 as the symbol "ä". Raises NotExpressible.
    """
    if byte_level and not text.isascii():
        raise NotExpressible(
            f"{path}: token {token_id}",
            f"the added token {text!r} has the same id as the byte-level symbols {text!r}, and llama.cpp would print "
            "the added token wherever another text contains the bytes of the symbols",
            instead=f"add a token with another text, such as '<{text}>'",
        )


#: Order of the keys in llama.cpp's converter. The order gives the place of a new key.
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
)
