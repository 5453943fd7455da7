"""Check the special token ids in a GGUF and the GGUF flags for adding BOS and EOS to each text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from exporter.io.json_objects import read_object
from exporter.sources.gguf.split_files import GgufModel
from exporter.verify.expect.added_tokens import loaded_tokens, special_settings
from exporter.verify.expect.files import GENERATION, settings
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check

_KEYS: Final = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}
#: Values of tokenizer.ggml.model or tokenizer.ggml.pre for which llama.cpp adds BOS or EOS by default. Source: load of
#: llama_vocab.
_ASSUMED: Final = {
    "bos": {"llama", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"},
    "eos": {"t5"},
}


def check_specials(gguf: GgufModel, reference: Reference) -> Iterator[Check]:
    """Check a GGUF's special token ids and flags for adding BOS and EOS against the tokenizer files.

    If the flags are correct, llama.cpp and transformers add the same special tokens to each text.
    """
    files = reference.auxiliary_files
    content = reference.tokenizer
    if not content:
        return
    wanted = _wanted(reference, content)
    wrong = []
    for role, key in _KEYS.items():
        value = gguf.metadata.get(key)
        if value not in wanted[role]:
            expected = " or ".join(str(token_id) for token_id in wanted[role])
            wrong.append(f"{key}: expected {expected}, found {value}")
    for role in ("bos", "eos"):
        key = f"tokenizer.ggml.add_{role}_token"
        want = _adds(reference.tokenizer_file(), content, settings(files), role, wanted[role])
        if _flag(gguf, role) != want:
            wrong.append(f"{key}: expected {want} (as in transformers), found {gguf.metadata.get(key)}")
    detail = wrong[0] if wrong else "special token ids and BOS/EOS flags match the tokenizer"
    yield Check(name="special ids", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _wanted(reference: Reference, content: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return a dict from each special token role, such as BOS, to the list of token ids that are accepted in the GGUF.

    If the tokenizer defines a token for a role, only the tokenizer's token id is accepted. If the tokenizer defines no
    token for a role, the token ids in the config files are accepted. If neither the tokenizer nor the config files
    define a token id for a role, the list contains only None, and the GGUF must omit the id.
    """
    files = reference.auxiliary_files
    named = special_settings(files, content)
    vocab = content["model"].get("vocab")
    by_text = dict(vocab) if isinstance(vocab, dict) else {}
    by_text |= {token.text: token_id for token_id, token in loaded_tokens(files, content).items()}
    by_text = {text: token_id for text, token_id in by_text.items() if token_id < reference.vocab}
    configs = [reference.checkpoint.config, reference.checkpoint.text_config]
    configs += [read_object(files[GENERATION])] if GENERATION in files else []
    last = _last(content.get("post_processor"))
    out: dict[str, list[Any]] = {}
    for role in _KEYS:
        entry = named.get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        own = [by_text[text]] if isinstance(text, str) and text in by_text else []
        if role == "eos" and last in by_text:
            own.append(by_text[last])  # the token at the end of texts differs from the named EOS
        stated = [_first(config.get(f"{role}_token_id")) for config in configs]
        known = [token_id for token_id in stated if type(token_id) is int and token_id >= 0]
        out[role] = own or known or [None]
        if role == "unk" and not own:
            out[role] += [None, by_text.get(content["model"].get("unk_token"))]
    return out


def _first(entry: Any) -> Any:
    return entry[0] if isinstance(entry, list) and entry else entry


def _last(processor: Any) -> str | None:
    """Return the special token that a tokenizer's post-processor appends to every text, or None if there is none."""
    if not isinstance(processor, dict):
        return None
    for step in processor.get("processors") or [processor]:
        pieces = step.get("single") if isinstance(step, dict) else None
        if isinstance(pieces, list) and len(pieces) > 1 and isinstance(pieces[-1], dict):
            token = pieces[-1].get("SpecialToken")
            return str(token.get("id")) if isinstance(token, dict) else None
    return None


def _adds(path: Path | None, content: Mapping[str, Any], named: Mapping[str, Any], role: str, ids: list[Any]) -> bool:
    """Encode a text to determine whether the tokenizer adds the special token ``role`` (BOS or EOS) to every text."""
    if path is None or content.get("post_processor") is None:
        # transformers drops the flags of tokenizer_config.json beside a tokenizer.json.
        return path is None and named.get(f"add_{role}_token") is True and ids != [None]
    from tokenizers import Tokenizer  # a large library, imported only if needed

    encoded = Tokenizer.from_file(str(path)).encode("a").ids
    return bool(encoded) and encoded[0 if role == "bos" else -1] in ids


def _flag(gguf: GgufModel, role: str) -> bool:
    value = gguf.metadata.get(f"tokenizer.ggml.add_{role}_token")
    if value is None:
        names = {gguf.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")}
        return bool(names & _ASSUMED[role])
    return bool(value)
