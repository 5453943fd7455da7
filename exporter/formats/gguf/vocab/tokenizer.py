"""Convert a SentencePiece or byte-level BPE tokenizer to GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import NotExpressible, UnreadableFile, UsageError
from exporter.families import FAMILIES
from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab.added_tokens import added_tokens
from exporter.formats.gguf.vocab.byte_level import byte_level_keys
from exporter.formats.gguf.vocab.sentencepiece import sentencepiece_keys
from exporter.formats.gguf.vocab.spaces import spaces_of_class
from exporter.formats.gguf.vocab.special_tokens import special_keys
from exporter.formats.gguf.vocab.templates import template_keys
from exporter.formats.gguf.vocab.tokens import flag_notes, with_rows
from exporter.formats.gguf.writer import Key
from exporter.io.json_objects import read_object
from exporter.merge.vocabulary.templates import chat_templates
from exporter.sources.hf.tokenizer import read_tokenizer
from exporter.sources.hf.vocabulary_files import read_vocabulary_files


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The GGUF keys of a tokenizer, and notes on properties of the tokenizer that a GGUF cannot represent."""

    keys: Sequence[Key]
    notes: Sequence[str]


def vocabulary(
    files: Mapping[str, Path],
    config: Mapping[str, Any],
    vocab: int,
    *,
    where: Path,
    pre_tokenizer: str | None = None,
    generation: Mapping[str, Any] | None = None,
    templates: Mapping[str, str] | None = None,
    strips: bool = False,
) -> Vocabulary:
    """Convert a tokenizer to GGUF metadata for a model whose embedding has ``vocab`` rows.

    files: maps the names of the tokenizer files to their paths. config, generation: the parsed config.json and
    generation_config.json.
    pre_tokenizer: the pre-tokenizer name to write for a byte-level BPE tokenizer, or None to write the name that
    ttexport recognises. templates: dict from name to text of each chat template, or None to take the templates from
    ``files``. strips: whether the model's name makes llama.cpp apply the flag ``rstrip`` exactly.
    Raises NotExpressible for tokenizers that llama.cpp does not support, BadInput for broken
    tokenizers, and UsageError if ``pre_tokenizer`` is given but the tokenizer is not a byte-level BPE.
    """
    settings = read_object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    content = _content(files, where, settings, config.get("model_type"))
    settings = {**content.get("default_tokens", {}), **settings}
    added, lost_notes = with_rows(added_tokens(files, content, settings), vocab)
    path = files.get("tokenizer.json", files.get("vocab.json", where))
    sentencepiece = not content or _is_sentencepiece(path, content)
    ids = {token.text: token.id for token in added}
    family = FAMILIES.get(str(config.get("model_type")))
    is_copied = family is not None and family.llama_cpp.copies_prefix_space
    copied = is_copied and isinstance(settings.get("add_prefix_space"), bool)
    if sentencepiece:
        if pre_tokenizer:
            raise UsageError("--pre-tokenizer needs a byte-level BPE, but this model has a SentencePiece tokenizer")
        class_spaces = spaces_of_class(settings, config.get("model_type"))
        keys, notes, name, named = sentencepiece_keys(
            files, content, added, vocab, state_prefix=copied, class_spaces=class_spaces
        )
        ids = {**named, **ids}
    else:
        keys, notes, name = byte_level_keys(
            path,
            content,
            added,
            vocab,
            model_type=config.get("model_type"),
            pre_tokenizer=pre_tokenizer,
        )
        if copied:
            keys.append(writer.truth("tokenizer.ggml.add_space_prefix", settings["add_prefix_space"]))
    id_keys, id_notes = special_keys(files, (config, generation or {}), content, settings, ids, vocab, name)
    keys += id_keys
    notes += id_notes
    keys += template_keys(chat_templates(files) or {} if templates is None else templates)
    return Vocabulary(keys, [*notes, *lost_notes, *flag_notes(added, strips=strips)])


def _content(
    files: Mapping[str, Path], where: Path, settings: Mapping[str, Any], model_type: object
) -> Mapping[str, Any]:
    """Return the parsed tokenizer.json, {} if the tokenizer is in tokenizer.model, or the content of vocab.json."""
    if path := files.get("tokenizer.json"):
        return read_tokenizer(path)
    if "tokenizer.model" in files:
        return {}
    if content := read_vocabulary_files(files, settings, model_type):
        return content
    raise UnreadableFile(where / "tokenizer.json", "a GGUF needs a tokenizer, but this file does not exist")


def _is_sentencepiece(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether the tokenizer is SentencePiece rather than byte-level BPE.

    Raises NotExpressible if the tokenizer is neither SentencePiece nor byte-level BPE.
    """
    model = content.get("model")
    if not isinstance(model, dict):
        raise UnreadableFile(path, f"model: expected an object, found {model!r:.80}")
    model_type = model.get("type", "BPE" if "merges" in model else None)
    if model_type not in ("BPE", "Unigram"):
        raise NotExpressible(
            f"gguf: {path}",
            f"expected a byte-level BPE or SentencePiece tokenizer, found a {model_type} tokenizer",
            instead="use --to hf or --to onnx to export this model",
        )
    return model_type == "Unigram" or bool(model.get("byte_fallback"))
