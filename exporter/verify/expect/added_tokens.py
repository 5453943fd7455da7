"""Work out which added tokens transformers gives a tokenizer when it loads the tokenizer's files.

This account is separate from the account of the GGUF writer. It repeats the calls of transformers in their order:
``PreTrainedTokenizerBase._from_pretrained`` merges the files, ``TokenizersBackend.__init__`` collects the tokens, and
``add_tokens`` of the tokenizers library gives the ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporter.io.json_objects import read_object
from exporter.verify.expect.files import AddedToken, added, settings

_ATTRIBUTES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def loaded_tokens(files: Mapping[str, Path], content: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return a dict from token id to added token, as in a tokenizer that transformers loaded.

    files: the tokenizer files by name. content: the parsed tokenizer.json.
    """
    tokens = added(content)
    kwargs = special_settings(files, content)
    named = _named(kwargs)
    extra = kwargs.get("extra_special_tokens")
    listed = [_flagged(entry) for entry in extra] if isinstance(extra, list) else []
    queue = [
        (text, special or text in named)
        for _, (text, special) in sorted(_numbered(files, tokens, {*named, *(text for text, _ in listed)}).items())
    ]
    queue += [(text, True) for text in named] + listed
    vocabulary = _texts(content)
    by_text = {token.text: token_id for token_id, token in tokens.items()}
    for text, special in queue:
        if text and text not in by_text:
            following = max([len(vocabulary), *(token_id + 1 for token_id in tokens)])
            token_id = by_text[text] = vocabulary.get(text, following)
            if token_id not in tokens:
                tokens[token_id] = AddedToken(token_id, text, special)
    return tokens


def special_settings(files: Mapping[str, Path], content: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json after transformers has merged special_tokens_map.json into it.

    A tokenizer class without a tokenizer.json (``content``) adds tokens with a role by default.

    Without added_tokens_decoder in tokenizer_config.json, every key of special_tokens_map.json replaces the same key of
    tokenizer_config.json, and lists of extra tokens are joined. With added_tokens_decoder, the map is not read.
    """
    kwargs = {**content.get("default_tokens", {}), **settings(files)}
    if kwargs.get("additional_special_tokens") is not None and not kwargs.get("extra_special_tokens"):
        kwargs["extra_special_tokens"] = kwargs.pop("additional_special_tokens")
    if "special_tokens_map.json" in files and "added_tokens_decoder" not in kwargs:
        for key, value in read_object(files["special_tokens_map.json"]).items():
            before = kwargs.get(key)
            if isinstance(value, list) and isinstance(before, list) and key == "extra_special_tokens":
                kwargs[key] = before + [entry for entry in value if entry not in before]
            elif isinstance(value, dict) and isinstance(before, dict) and key == "extra_special_tokens":
                kwargs[key] = before | value
            else:
                kwargs[key] = value
    kwargs.setdefault("extra_special_tokens", kwargs.get("additional_special_tokens"))
    return kwargs


def _numbered(
    files: Mapping[str, Path], tokens: Mapping[int, AddedToken], special: set[str]
) -> dict[int, tuple[str, bool]]:
    """Return the tokens that a file other than tokenizer.json lists with an id, as a dict id → (text, special flag).

    The id only orders the tokens. An entry of added_tokens.json whose id belongs to a token of tokenizer.json is out of
    date, and transformers replaces the entry by that token.
    """
    decoder = settings(files).get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return {int(token_id): _flagged(entry) for token_id, entry in decoder.items()}
    older = read_object(files["added_tokens.json"]) if "added_tokens.json" in files else {}
    return {token_id: (text, text in special) for text, token_id in older.items() if token_id not in tokens}


def _named(kwargs: Mapping[str, Any]) -> list[str]:
    """Return the texts of the tokens with a role, then the texts of tokens of the model, such as image_token."""
    other = [key for key in kwargs if key.endswith("_token") and key not in _ATTRIBUTES]
    entries = [kwargs.get(key) for key in (*_ATTRIBUTES, *other)]
    if isinstance(extra := kwargs.get("extra_special_tokens"), dict):
        entries += extra.values()
    return [_flagged(entry)[0] for entry in entries if isinstance(entry, str | dict)]


def _flagged(entry: Any) -> tuple[str, bool]:
    """Return (text, whether the token is special) of a token that is stored as a string or as an object with flags."""
    if isinstance(entry, dict):
        return str(entry.get("content", "")), bool(entry.get("special"))
    return str(entry), True


def _texts(content: Mapping[str, Any]) -> dict[str, int]:
    vocab = content.get("model", {}).get("vocab") or {}
    if isinstance(vocab, dict):
        return vocab
    return {piece[0]: number for number, piece in enumerate(vocab)}
