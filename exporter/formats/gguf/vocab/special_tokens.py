"""Make the GGUF metadata for special tokens: the token ids, and the flags for adding a special token to each text.

The id of a special token is looked up in the tokenizer's settings, as transformers reads the settings, and then in
config.json and generation_config.json. The flag for adding a special token is looked up in the post-processor of
tokenizer.json. transformers uses the flags of tokenizer_config.json only if there is no tokenizer.json.

llama.cpp finds fill-in-the-middle tokens and most end-of-turn tokens by their text. Therefore, ttexport writes the id
of an end-of-turn token only if llama.cpp would not find the token by its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput
from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab.added_tokens import named_settings
from exporter.formats.gguf.vocab.post_processor import Specials, post_process
from exporter.formats.gguf.writer import Key
from exporter.sources.hf.by_llama_cpp.tokens import ENDS

_ID_KEYS: Final = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # llama.cpp's spelling
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
}
_ADD_KEYS: Final = {role: f"tokenizer.ggml.add_{role}_token" for role in ("bos", "eos", "sep")}
_KINDS: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

#: Tokens that llama.cpp adds to a text if the file has no flag. Keys: tokenizer.ggml.model or, for byte-level BPE,
#: tokenizer.ggml.pre. Source: llama_vocab::impl::load.
_ASSUMED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("llama", "llama-bpe", "falcon-h1", "lfm2", "tekken"), "bos"),
    "t5": "eos",
}


def special_keys(
    files: Mapping[str, Path],
    configs: tuple[Mapping[str, Any], Mapping[str, Any]],
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    ids: Mapping[str, int],
    rows: int,
    name: str,
) -> tuple[list[Key], list[str]]:
    """Return (GGUF keys with the ids and flags of special tokens, notes).

    configs: the parsed config.json and generation_config.json. tokenizer, settings: the parsed tokenizer.json and
    tokenizer_config.json, or {} if a file is absent. ids: maps the texts of added tokens and control pieces to ids.
    name: the value of tokenizer.ggml.model, or the value of tokenizer.ggml.pre if tokenizer.ggml.model is "gpt2".
    Raises BadInput for a token id outside the vocabulary.
    """
    config, generation = configs
    specials = Specials(_texts(named_settings(files, settings)))
    for role, substitute in (("bos", "cls"), ("eos", "sep")):
        if role not in specials.texts and substitute in specials.texts:
            specials.texts[role] = specials.texts[substitute]
    post_process(tokenizer.get("post_processor"), specials)
    notes = _add_by_settings(specials, settings, alone="tokenizer.json" not in files)
    special_ids = {role: ids[text] for role, text in specials.texts.items() if text in ids}
    _fill(special_ids, config, "config.json", rows)
    _fill(special_ids, generation, "generation_config.json", rows)
    notes += _further_ends(special_ids, configs, ids, rows)
    _eot_by_number(special_ids, config, ids, rows)
    assumed = _ASSUMED.get(name)
    if tokenizer and assumed:
        specials.added.setdefault(assumed, False)
    elif assumed == "bos" and "bos" not in specials.added:
        notes.append(
            "llama.cpp adds the BOS token before each text, but transformers does not, because there is no "
            "tokenizer.json and tokenizer_config.json does not set add_bos_token"
        )
    keys = [writer.u32(_ID_KEYS[role], special_ids[role]) for role in _ID_KEYS if role in special_ids]
    keys += [writer.truth(_ADD_KEYS[role], specials.added[role]) for role in _ADD_KEYS if role in specials.added]
    return keys, notes


def _add_by_settings(specials: Specials, settings: Mapping[str, Any], *, alone: bool) -> list[str]:
    """Record the flags of tokenizer_config.json, and return notes on flags that transformers does not use.

    alone: whether there is no tokenizer.json, beside which transformers removes the flags.
    """
    notes = []
    for role in _KINDS:
        if isinstance(flag := settings.get(f"add_{role}_token"), bool):
            added = specials.added.setdefault(role, flag and alone)
            if flag and not added:
                notes.append(
                    f"tokenizer_config.json sets add_{role}_token, but transformers ignores the setting because "
                    f"tokenizer.json adds no {role.upper()} token to a text, so the GGUF adds none either"
                )
    return notes


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    entries = {role: _content(settings.get(f"{role}_token")) for role in _KINDS}
    return {role: text for role, text in entries.items() if text is not None}


def _fill(special_ids: dict[str, int], config: Mapping[str, Any], name: str, rows: int) -> None:
    """Add the special token ids of ``config`` to ``special_ids``, without replacing ids that are already known."""
    for role in _KINDS:
        token_id = config.get(f"{role}_token_id")
        if type(token_id) is int and token_id >= 0:  # older configs use -1 for a missing token
            if token_id >= rows and role not in special_ids:
                raise BadInput(f"{name}: {role}_token_id: expected an id below {rows}, found {token_id}")
            special_ids.setdefault(role, token_id)


def _further_ends(
    special_ids: dict[str, int],
    configs: tuple[Mapping[str, Any], Mapping[str, Any]],
    ids: Mapping[str, int],
    rows: int,
) -> list[str]:
    """If the configs list several EOS tokens, add the second and the third as the EOT and the EOM token of the GGUF.

    Returns a note that lists all further EOS tokens, for which a GGUF has no metadata key.
    """
    texts = {token_id: text for text, token_id in ids.items()}
    left = []
    for name, token_id in _eos_ids(configs):
        if not 0 <= token_id < rows:
            raise BadInput(f"{name}: eos_token_id: expected ids below {rows}, found {token_id}")
        special_ids.setdefault("eos", token_id)
        known = {special_ids.get(role) for role in ("eos", "eot", "eom")}
        if token_id in known or texts.get(token_id) in ENDS:
            continue
        free = next((role for role in ("eot", "eom") if role not in special_ids), None)
        if free:
            special_ids[free] = token_id
        else:
            left.append(token_id)
    return [f"a GGUF has no metadata key for the additional EOS token ids {', '.join(map(str, left))}"] if left else []


def _eos_ids(configs: tuple[Mapping[str, Any], Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    for name, config in zip(("config.json", "generation_config.json"), configs, strict=True):
        entry = config.get("eos_token_id")
        for token_id in entry if isinstance(entry, list) else [entry]:
            if type(token_id) is int and token_id >= 0:
                yield name, token_id


def _eot_by_number(special_ids: dict[str, int], config: Mapping[str, Any], ids: Mapping[str, int], rows: int) -> None:
    """Add an EOT id that llama.cpp's converter hard-codes, if the token with that id has the expected text."""
    if config.get("model_type") == "gemma" and ids.get("<end_of_turn>") == 107:
        special_ids["eot"] = 107
    if config.get("model_type") == "llama" and rows == 32016 and ids.get("\u2581<EOT>") == 32010:  # CodeLlama
        special_ids["eot"] = 32010


def _content(entry: Any) -> str | None:
    """Return the text of a token. A JSON file stores the token as a string or as an object with flags."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) and text else None
