"""Determine the added tokens of a tokenizer, and their ids, as transformers does.

transformers takes added tokens from tokenizer.json, and then adds every token that a further file names: tokens with
a role (such as pad_token), tokens of a model (such as image_token), and extra special tokens. A text that is already in
tokenizer.json keeps its id and its flags, whatever an older file says. A new text gets the next free id.
Sources: ``PreTrainedTokenizerBase._from_pretrained`` and ``TokenizersBackend.__init__`` in transformers, and
``AddedVocabulary::add_tokens`` in the tokenizers library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from exporter.errors import UnreadableFile
from exporter.formats.gguf.vocab.tokens import FLAGS, AddedToken
from exporter.io.json_objects import read_object
from exporter.sources.hf.sentencepiece import read_model

SETTINGS: Final = "tokenizer_config.json"
SPECIAL_TOKENS_MAP: Final = "special_tokens_map.json"
_DECODER: Final = "added_tokens_decoder"
_EXTRA: Final = ("extra_special_tokens", "additional_special_tokens")
#: The order in which transformers adds the tokens with a role.
ROLES: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def named_settings(files: Mapping[str, Path], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``settings`` (the parsed tokenizer_config.json) with the special tokens of special_tokens_map.json.

    transformers reads special_tokens_map.json only beside a tokenizer_config.json without added_tokens_decoder. A token
    of special_tokens_map.json then replaces the token of tokenizer_config.json.
    """
    path = files.get(SPECIAL_TOKENS_MAP)
    if path is None or _DECODER in settings:
        return settings
    mapped = read_object(path)
    merged = {**settings, **{key: value for key, value in mapped.items() if key not in _EXTRA}}
    own = next((settings[key] for key in _EXTRA if settings.get(key)), None)
    listed = mapped.get("extra_special_tokens")
    if isinstance(listed, list):
        merged["extra_special_tokens"] = [*(own if isinstance(own, list) else []), *listed]
    elif isinstance(listed, dict):
        merged["extra_special_tokens"] = {**(own if isinstance(own, dict) else {}), **listed}
    elif not settings.keys() & set(_EXTRA) and "additional_special_tokens" in mapped:
        merged["extra_special_tokens"] = mapped["additional_special_tokens"]
    return merged


def added_tokens(
    files: Mapping[str, Path], content: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[AddedToken]:
    """Return the added tokens, sorted by id.

    content: the parsed tokenizer.json, or {} if the vocabulary is in tokenizer.model, whose added tokens keep the ids
    that tokenizer_config.json and added_tokens.json state. Without any vocabulary, only the tokens with a stated id are
    returned. settings: the parsed tokenizer_config.json.
    Raises UnreadableFile for entries that are not tokens.
    """
    listed = _listed(files, content)
    if not content and "tokenizer.model" not in files:
        return list(_stated(files, settings).values())
    stated = _stated(files, settings)
    named = list(_named(named_settings(files, settings)))
    roles = {token.text for token in named}
    if content:
        tokens = {token.id: replace(token, stated=token.id in stated) for token in listed.values()}
        if _DECODER not in settings:
            stated = {token_id: token for token_id, token in stated.items() if token_id not in tokens}
    else:
        tokens, stated = {token.id: token for token in stated.values()}, {}
    pending = [replace(stated[token_id], stated=False) for token_id in sorted(stated)]
    pending = [replace(token, special=token.special or token.text in roles) for token in pending]
    pending += [*named, *_extra(named_settings(files, settings), files)]
    _append(tokens, pending, _Vocabulary(files, content))
    return [tokens[token_id] for token_id in sorted(tokens)]


class _Vocabulary:
    """The pieces of a tokenizer without its added tokens. The pieces are read only if a token must be looked up."""

    def __init__(self, files: Mapping[str, Path], content: Mapping[str, Any]) -> None:
        self._files, self._content = files, content
        self._ids: Mapping[str, int] | None = None

    @property
    def ids(self) -> Mapping[str, int]:
        """Map the text of each piece to the piece's id."""
        if self._ids is None:
            vocab = self._content.get("model", {}).get("vocab") or {}
            if isinstance(vocab, list):
                vocab = {str(piece[0]): index for index, piece in enumerate(vocab) if isinstance(piece, list) and piece}
            if not vocab and "tokenizer.model" in self._files:
                texts = read_model(self._files["tokenizer.model"]).texts
                vocab = {text: index for index, text in enumerate(texts)}
            self._ids = vocab if isinstance(vocab, dict) else {}
        return self._ids


def _append(tokens: dict[int, AddedToken], pending: list[AddedToken], vocabulary: _Vocabulary) -> None:
    """Add the tokens ``pending`` to ``tokens``, with the ids that the tokenizers library gives."""
    known = {token.text for token in tokens.values()}
    for token in pending:
        if not token.text or token.text in known:
            continue
        token_id = vocabulary.ids.get(token.text)
        if token_id is None:
            token_id = max(len(vocabulary.ids), max(tokens, default=-1) + 1)
        known.add(token.text)
        tokens.setdefault(token_id, replace(token, id=token_id))  # a token of tokenizer.json keeps its id


def _listed(files: Mapping[str, Path], content: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the added tokens of tokenizer.json."""
    entries = content.get("added_tokens") or []
    if not isinstance(entries, list):
        raise UnreadableFile(files["tokenizer.json"], f"added_tokens: expected a list, found {entries!r:.80}")
    tokens = {}
    for entry in entries:
        token_id = entry.get("id") if isinstance(entry, dict) else None
        token = _token(files["tokenizer.json"], entry, token_id)
        tokens[token.id] = replace(token, listed=True)
    return tokens


def _stated(files: Mapping[str, Path], settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the tokens of tokenizer_config.json's added_tokens_decoder or, without one, of added_tokens.json."""
    decoder = settings.get(_DECODER)
    tokens: dict[int, AddedToken] = {}
    if decoder is not None and not isinstance(decoder, dict):
        raise UnreadableFile(files[SETTINGS], f"{_DECODER}: expected an object, found {decoder!r:.80}")
    for key, entry in (decoder or {}).items():
        token = _token(files[SETTINGS], entry, key)
        tokens[token.id] = replace(token, stated=True)
    if decoder is None and (path := files.get("added_tokens.json")):
        named = named_settings(files, settings)
        special = {token.text for token in (*_named(named), *_extra(named, files))}
        for text, token_id in read_object(path).items():
            entry = {"content": text, "special": text in special, "normalized": text not in special}
            token = _token(path, entry, token_id)
            tokens[token.id] = replace(token, stated=True)
    return tokens


def _named(settings: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Yield the tokens that ``settings`` names by a role, or as tokens of the model. Their ids are not known yet."""
    entries = [settings.get(f"{role}_token") for role in ROLES]
    entries += [
        value for key, value in settings.items() if key.endswith("_token") and key.removesuffix("_token") not in ROLES
    ]
    if isinstance(extra := settings.get("extra_special_tokens"), dict):
        entries += extra.values()
    for entry in entries:
        if isinstance(entry, str) and entry:
            yield AddedToken(-1, entry, special=True)
        elif isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield replace(_token(Path(SETTINGS), entry, 0), id=-1, special=True)


def _extra(settings: Mapping[str, Any], files: Mapping[str, Path]) -> Iterator[AddedToken]:
    """Yield the extra special tokens that ``settings`` lists. Their ids are not known yet."""
    entries: Any = next((settings[key] for key in _EXTRA if settings.get(key)), [])
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, str):
            yield AddedToken(-1, entry, special=True)
        else:
            yield replace(_token(files.get(SETTINGS, Path(SETTINGS)), entry, 0), id=-1)


def _token(path: Path, entry: Any, token_id: Any) -> AddedToken:
    if isinstance(token_id, str) and token_id.isdecimal():
        token_id = int(token_id)
    if not isinstance(entry, dict) or type(token_id) is not int or not isinstance(entry.get("content"), str):
        raise UnreadableFile(path, f"added tokens: expected a token with id and content, found {entry!r:.80}")
    flags = tuple(flag for flag in FLAGS if entry.get(flag))
    return AddedToken(token_id, entry["content"], bool(entry.get("special")), bool(entry.get("normalized")), flags)
