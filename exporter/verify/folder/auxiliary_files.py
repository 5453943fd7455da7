"""Check the tokenizer, tokenizer settings, chat templates and generation config in an artifact's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from exporter.io.files import read_file
from exporter.io.json_objects import parse_object, read_object
from exporter.sources.hf.checkpoint import auxiliary_files
from exporter.sources.hf.tokenizer import read_tokenizer
from exporter.verify.expect.files import GENERATION, SETTINGS, TOKENIZER, added, decoder, settings
from exporter.verify.expect.reference import Reference
from exporter.verify.expect.templates import TEMPLATE, is_of_processor, named, templates
from exporter.verify.folder.special_ids import SPECIAL_IDS
from exporter.verify.report import Check, Skip

#: Settings that change how a tokenizer works. Settings such as names of classes depend on the version of transformers
#: and are not compared.
_COMPARED_SETTINGS: Final = (
    *(f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "model_max_length"),
    *("padding_side", "truncation_side", "split_special_tokens"),
)
#: Tokenizer files besides tokenizer.json, compared as bytes.
_OTHER_TOKENIZERS: Final = (
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model"),
)


def check_auxiliary_files(folder: Path, reference: Reference) -> Iterator[Check | Skip]:
    """Yield the checks of the auxiliary files in ``folder``, a folder with a checkpoint or an ONNX model."""
    files, expected_files = auxiliary_files(folder), reference.auxiliary_files
    yield _check_tokenizer(files, expected_files, reference.vocab)
    yield _check_settings(files, expected_files)
    yield _check_templates(files, reference)
    if any(map(is_of_processor, expected_files)):
        yield _check_processor(files, expected_files)
    if GENERATION in files or (folder / "config.json").is_file():
        yield _check_generation(files, expected_files)
    else:
        yield Skip("generation config", "the folder contains neither config.json nor generation_config.json")


def _check_tokenizer(files: Mapping[str, Path], expected_files: Mapping[str, Path], vocab: int) -> Check:
    """Check that the tokenizer files in ``files`` encode and decode texts as the tuned model's tokenizer files do."""
    wrong = []
    for name in (TOKENIZER, *_OTHER_TOKENIZERS):
        if name not in expected_files:
            continue
        if name not in files:
            # If the tuned model has a tokenizer.json, the older tokenizer files are optional.
            wrong += (
                [f"{name}: expected this file in the model's folder, found no such file"]
                if name == TOKENIZER or _lone(expected_files)
                else []
            )
        elif read_file(files[name]) != read_file(expected_files[name]):
            wrong += [f"{name}: {why}" for why in _differences(files[name], expected_files[name])]
    if TOKENIZER in files:
        tokens = added(read_tokenizer(files[TOKENIZER])).values()
        wrong += [
            f"{TOKENIZER}: added token {token.id}: expected a text, found an empty text"
            for token in tokens
            if not token.text
        ]
        wrong += [
            f"{TOKENIZER}: added token {token.text!r:.60}: expected an id below {vocab}, found {token.id}"
            for token in tokens
            if token.id >= vocab
        ]
    detail = wrong[0] if wrong else "the tokenizer files match the tuned model's tokenizer files"
    return Check(name="tokenizer files", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _lone(files: Mapping[str, Path]) -> bool:
    return TOKENIZER not in files


def _differences(path: Path, expected_path: Path) -> Iterator[str]:
    if expected_path.name != TOKENIZER:
        yield "expected the content of the tuned model's file, found different content"
        return
    content, expected = read_tokenizer(path), read_tokenizer(expected_path)
    for key in sorted(content.keys() | expected.keys()):
        if key == "model":
            parts = content[key].keys() | expected[key].keys()
            names = sorted(part for part in parts if content[key].get(part) != expected[key].get(part))
            yield from (f"the key model.{name} differs from the tuned model's tokenizer.json" for name in names)
        elif content.get(key) != expected.get(key):
            yield f"the key {key} differs from the tuned model's tokenizer.json"
    if decoder(path) != decoder(expected_path):
        yield "the key decoder differs from the tuned model's tokenizer.json"


def _check_settings(files: Mapping[str, Path], expected_files: Mapping[str, Path]) -> Check:
    values, expected = settings(files), settings(expected_files)
    wrong = []
    if SETTINGS in expected_files and SETTINGS not in files:
        wrong.append(f"{SETTINGS}: expected this file in the model's folder, found no such file")
    for key in _COMPARED_SETTINGS if not wrong else ():
        if _plain(values.get(key)) != _plain(expected.get(key)):
            wrong.append(
                f"{SETTINGS}: {key}: expected {_plain(expected.get(key))!r:.60}, found {_plain(values.get(key))!r:.60}"
            )
    detail = wrong[0] if wrong else "the tokenizer settings match the tuned model's settings"
    return Check(name="tokenizer settings", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _plain(entry: Any) -> Any:
    """Return the text of a special token that a tokenizer config contains as a string or as an object with flags."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _check_templates(folder: Mapping[str, Path], reference: Reference) -> Check:
    """Check that a folder and the tuned model have the same chat templates: equal names and equal texts.

    folder: the auxiliary files of the folder, by name. If a folder stores chat templates in separate files and in
    tokenizer_config.json, both must contain the same texts, unless the tokenizer_config.json is the tuned model's.
    """
    texts, expected = templates(folder), reference.templates
    wrong = [
        f"chat template {name}: expected {'the template of the tuned model' if name in expected else 'no template'}, "
        f"found {'no template' if name not in texts else 'a different text' if name in expected else 'a template'}"
        for name in sorted(texts.keys() | expected.keys())
        if texts.get(name) != expected.get(name)
    ]
    setting = settings(folder).get("chat_template")
    kept = setting is None or setting == settings(reference.auxiliary_files).get("chat_template")
    if not kept and named(setting) != texts:
        wrong.append(f"{SETTINGS}: chat_template: expected the same text as in {TEMPLATE}, found a different text")
    detail = wrong[0] if wrong else f"{len(texts)} chat templates match the tuned model's chat templates"
    return Check(name="chat template", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _check_processor(files: Mapping[str, Path], expected_files: Mapping[str, Path]) -> Check:
    """Check that the files of the model's processor equal the tuned model's files, apart from the chat template."""
    names = sorted(filter(is_of_processor, expected_files))
    wrong = []
    for name in names:
        if name not in files:
            wrong.append(f"{name}: expected this file in the model's folder, found no such file")
        elif _of_processor(files[name]) != _of_processor(expected_files[name]):
            wrong.append(f"{name}: expected the content of the tuned model's file, found different content")
    detail = wrong[0] if wrong else f"{len(names)} files of the processor match the tuned model's files"
    return Check(name="processor files", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _of_processor(path: Path) -> bytes | dict[str, Any]:
    content = read_file(path)
    if path.name != "processor_config.json":
        return content
    return {key: value for key, value in parse_object(path, content, what=path.name).items() if key != "chat_template"}


def _check_generation(files: Mapping[str, Path], expected_files: Mapping[str, Path]) -> Check:
    """Check that generation_config.json equals the tuned model's generation_config.json, except for special token ids.

    Special token ids have a separate check, because tuning may change the tokenizer and therefore the special token
    ids.
    """
    values, expected = (read_object(own[GENERATION]) if GENERATION in own else {} for own in (files, expected_files))
    free = SPECIAL_IDS | {"transformers_version", "_from_model_config"}
    wrong = [
        f"{GENERATION}: {key}: expected {expected.get(key)!r:.60}, found {values.get(key)!r:.60}"
        for key in sorted((values.keys() | expected.keys()) - free)
        if values.get(key) != expected.get(key)
    ]
    if GENERATION in expected_files and GENERATION not in files:
        wrong.append(f"{GENERATION}: expected this file in the model's folder, found no such file")
    detail = wrong[0] if wrong else f"{GENERATION} matches the tuned model's file"
    return Check(name="generation config", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
