"""Read the tokens, merges and pre-tokenizer of a byte-level BPE tokenizer, using only tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible, UnreadableFile
from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab import pre_tokenizers
from exporter.formats.gguf.vocab.normalizers import NFC_NOTE, normalizer_steps
from exporter.formats.gguf.vocab.tokens import NORMAL, AddedToken, TokenTable
from exporter.formats.gguf.writer import Key

_UNSUPPORTED: Final = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


def byte_level_keys(
    path: Path,
    content: Mapping[str, Any],
    added: Sequence[AddedToken],
    rows: int,
    *,
    model_type: object,
    pre_tokenizer: str | None,
) -> tuple[list[Key], list[str], str]:
    """Convert a parsed tokenizer.json with a byte-level BPE model to GGUF metadata keys.

    Returns (GGUF keys, notes, pre-tokenizer name). pre_tokenizer: the pre-tokenizer name to write, or None to write the
    name that ttexport recognises.
    Raises NotExpressible for an unknown pre-tokenizer or normalizer, and BadInput if a token has two ids.
    """
    model = content["model"]
    if unsupported := [key for key in _UNSUPPORTED if model.get(key)]:
        raise NotExpressible(
            f"gguf: {path}",
            f"llama.cpp's byte-level BPE does not support {' and '.join(unsupported)}",
            instead="use --to hf or --to onnx to export this model",
        )
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise UnreadableFile(path, f"model.vocab: expected an object that maps tokens to ids, found {vocab!r:.80}")
    notes = _normalizer_notes(path, content.get("normalizer"))
    table = TokenTable(rows, path, byte_level=True)
    table.check_ids([*vocab.values(), *(token.id for token in added)])
    table.put_all(vocab, NORMAL)
    for token in added:
        if (first := vocab.get(token.text, token.id)) != token.id:
            raise BadInput(f"{path}: {token.text!r}: expected a single token id, found {first} and {token.id}")
        table.add(token)
    merges = read_merges(path, model.get("merges"))
    _check_symbols(path, [token.text for token in added if token.text in vocab], merges)
    name = pre_tokenizer or pre_tokenizers.recognise(content, model_type, str(path))
    notes += pre_tokenizers.difference_notes(content)
    notes += pre_tokenizers.override_notes(pre_tokenizer, content) if pre_tokenizer else []
    keys = [
        writer.text("tokenizer.ggml.model", "gpt2"),
        writer.text("tokenizer.ggml.pre", name),
        writer.texts("tokenizer.ggml.tokens", table.complete()),
        writer.i32s("tokenizer.ggml.token_type", table.types),
    ]
    if merges:
        keys.append(writer.texts("tokenizer.ggml.merges", [_one_string(*pair) for pair in merges]))
    return keys, notes, name


def _check_symbols(path: Path, words: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
    """Raise NotExpressible if one of the added tokens ``words`` is also a byte, or bytes that the merges join.

    A byte-level BPE writes the byte 0xE4 as the symbol "ä". transformers then uses one id for the letter that was added
    and for the byte. llama.cpp prints an added token as it is written, and would print "ä" for the byte in other texts.
    """
    foreign = [word for word in words if not word.isascii()]
    joined = {left + right for left, right in merges} if foreign else set()
    if word := next((word for word in foreign if len(word) == 1 or word in joined), None):
        raise NotExpressible(
            f"gguf: {path}",
            f"the added token {word!r} has the same id as the byte-level symbols {word!r}, and llama.cpp would print "
            "the added token wherever another text contains the bytes of the symbols",
            instead=f"add a token with another text, such as '<{word}>', or use --to hf",
        )


def read_merges(path: Path, merges: list[tuple[str, str]] | list[str] | None) -> list[tuple[str, str]]:
    """Return the BPE merges as pairs (left, right).

    A tokenizer.json stores each BPE merge as a pair or as a single string. Raises UnreadableFile for merges that are
    neither pairs nor strings.
    """
    out: list[tuple[str, str]] = []
    for pair in merges or ():
        if isinstance(pair, str):
            left, _, right = pair.partition(" ")
            if not left or not right or " " in right:
                raise UnreadableFile(path, f"model.merges: expected pairs of tokens, found {pair!r:.80}")
            pair = (left, right)
        out.append(pair)
    return out


def _one_string(left: str, right: str) -> str:
    """Join the two parts of a BPE merge with a space, as llama.cpp expects.

    A space inside one of the two parts is replaced by byte-level BPE's symbol for the space.
    """
    if " " in left or " " in right:
        left, right = left.replace(" ", "\u0120"), right.replace(" ", "\u0120")
    return f"{left} {right}"


def _normalizer_notes(path: Path, normalizer: Any) -> list[str]:
    steps = normalizer_steps(normalizer)
    types = [step.get("type") if isinstance(step, Mapping) else step for step in steps]
    if unsupported := next((step_type for step_type in types if step_type != "NFC"), None):
        raise NotExpressible(
            f"gguf: {path}",
            f"llama.cpp does not apply the normalizer {unsupported!r:.80} of this byte-level BPE tokenizer",
            instead="remove the normalizer, or use --to hf and convert the checkpoint with llama.cpp's converter",
        )
    return [NFC_NOTE] if types else []
