"""Plans how a patch changes the tokenizer files and configs of an ONNX folder to match the adapter's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from exporter.formats.onnx.client_files import auxiliary_contents, genai_ids
from exporter.io.files import read_file
from exporter.io.json_objects import as_json, read_object
from exporter.merge.vocabulary.files import adapter_files, merge_auxiliary_files
from exporter.merge.vocabulary.special_ids import follow, generation_config
from exporter.merge.vocabulary.templates import merged_templates
from exporter.sources.hf.checkpoint import GENERATION_CONFIG, auxiliary_files
from exporter.sources.peft.adapter import Adapter

_CONFIG: Final = "config.json"
_GENAI: Final = "genai_config.json"
_GENAI_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


def merged_files(folder: Path, adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Return a dict that maps the name of each tokenizer file of the patched folder to the path of the file to copy.

    Raises BadInput if the tokenizers of two adapters differ and cannot be combined.
    """
    return merge_auxiliary_files(auxiliary_files(folder), adapters)


def patched_files(folder: Path, adapters: Sequence[Adapter], vocab: int | None) -> dict[str, bytes | None]:
    """Return the new contents of changed files, by file name; the content is None if the file is removed.

    vocab: number of vocabulary rows after patching, or None if the number does not change. Raises UnreadableFile if a
    config or tokenizer file is invalid.
    """
    base, merged = auxiliary_files(folder), merged_files(folder, adapters)
    contents: dict[str, bytes | None] = {}
    generation, moved = generation_config(base, merged)
    if adapter_files(adapters):
        templates = merged_templates(base, adapter_files(adapters), merged)
        contents |= dict.fromkeys(base) | auxiliary_contents(merged, *templates)
    if generation and GENERATION_CONFIG not in merged:
        contents[GENERATION_CONFIG] = as_json(generation)
    config = read_object(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    ids = genai_ids({**config, **(read_object(base[GENERATION_CONFIG]) if GENERATION_CONFIG in base else {})})
    if _update_config(config, vocab, moved):
        contents[_CONFIG] = as_json(config)
    if (folder / _GENAI).is_file():
        genai = read_object(folder / _GENAI)
        if _update_genai(genai, vocab, ids, genai_ids({**config, **generation})):
            contents[_GENAI] = as_json(genai)
    stored = {name: read_file(folder / name) if (folder / name).is_file() else None for name in contents}
    return {name: content for name, content in contents.items() if content != stored[name]}


def _update_config(config: dict[str, Any], vocab: int | None, moved: Mapping[str, tuple[int | None, int]]) -> bool:
    """Update the vocabulary size and the special token ids in config.json. Returns whether ``config`` changed."""
    nested = config.get("text_config")
    changed = False
    for table in (config, nested if isinstance(nested, dict) else {}):
        if vocab is not None and "vocab_size" in table:
            table["vocab_size"], changed = vocab, True
        changed |= follow(table, moved)
    return changed


def _update_genai(
    config: dict[str, Any], vocab: int | None, before: Mapping[str, Any], after: Mapping[str, Any]
) -> bool:
    """Update ``config``, the content of genai_config.json: the vocabulary size and the special token ids.

    Returns whether ``config`` changed.

    before, after: the special token ids in config.json and generation_config.json, before and after the patch. An id in
    genai_config.json changes only if the id differs between ``before`` and ``after``.
    """
    model = config.get("model")
    if not isinstance(model, dict) or (vocab is None and before == after):
        return False
    ids = {key: model[key] for key in _GENAI_IDS if key in model}
    for key in _GENAI_IDS:
        if before.get(key) != after.get(key):
            ids.pop(key, None)
            ids |= {key: after[key]} if key in after else {}
    entries: dict[str, Any] = {}
    for key, value in model.items():
        if key in _GENAI_IDS or key == "decoder":  # ttexport's writer places the ids before the decoder
            entries |= {name: ids[name] for name in _GENAI_IDS if name in ids}
        if key not in _GENAI_IDS:
            entries[key] = value
    if vocab is not None and "vocab_size" in entries:
        entries["vocab_size"] = vocab
    config["model"] = entries
    return True
