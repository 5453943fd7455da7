"""Checks of what lies beside the weights of a folder: tokenizer, its settings, chat template, generation config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from exporter.io.files import read_file
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import auxiliary_files
from exporter.sources.hf.tokenizer import read_tokenizer
from exporter.verify.expect.files import GENERATION, SETTINGS, TEMPLATE, TOKENIZER, added, decoder, settings, templates
from exporter.verify.expect.reference import Reference
from exporter.verify.folder.special_ids import SPECIAL_IDS
from exporter.verify.report import Check, Skip

#: Settings by which a tokenizer does something else; others, such as names of classes, change from version to version.
_SPEAKING: Final = (
    *(f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "model_max_length"),
    *("padding_side", "truncation_side", "split_special_tokens"),
)
#: Tokenizers that stand beside or in the place of tokenizer.json, and are copied as they are.
_COPIED: Final = ("tokenizer.model", "vocab.json", "merges.txt")


def check_auxiliary_files(folder: Path, reference: Reference) -> Iterator[Check | Skip]:
    """Yield the checks of ``folder``, which holds a checkpoint or an ONNX model."""
    found, wanted = auxiliary_files(folder), reference.auxiliary_files
    yield _check_tokenizer(found, wanted, reference.vocab)
    yield _check_settings(found, wanted)
    yield _check_templates(found, wanted)
    if GENERATION in found or (folder / "config.json").is_file():
        yield _check_generation(found, wanted)
    else:
        yield Skip("generation config", "the folder has none of transformers' configs")


def _check_tokenizer(found: Mapping[str, Path], wanted: Mapping[str, Path], vocab: int) -> Check:
    """The same tokens for every text and the same text for every token: all that decides on it is compared."""
    wrong = []
    for name in (TOKENIZER, *_COPIED):
        if name not in wanted:
            continue
        if name not in found:
            # A reference that has tokenizer.json as well needs none of the older files.
            wrong += [f"{name}: expected beside the model, found none"] if name == TOKENIZER or _lone(wanted) else []
        elif read_file(found[name]) != read_file(wanted[name]):
            wrong += [f"{name}: {why}" for why in _differences(found[name], wanted[name])]
    if TOKENIZER in found:
        tokens = added(read_tokenizer(found[TOKENIZER])).values()
        wrong += [f"{TOKENIZER}: added token {token.id} is blank" for token in tokens if not token.text]
        wrong += [f"{TOKENIZER}: token {token.id}: expected below {vocab}" for token in tokens if token.id >= vocab]
    detail = wrong[0] if wrong else "cuts and joins text as the tuned model's"
    return Check(name="tokenizer files", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _lone(files: Mapping[str, Path]) -> bool:
    return TOKENIZER not in files


def _differences(found: Path, wanted: Path) -> Iterator[str]:
    if wanted.name != TOKENIZER:
        yield "expected the bytes of the tuned model's, found others"
        return
    one, other = read_tokenizer(found), read_tokenizer(wanted)
    for key in sorted(one.keys() | other.keys()):
        if key == "model":
            parts = one[key].keys() | other[key].keys()
            names = sorted(part for part in parts if one[key].get(part) != other[key].get(part))
            yield from (f"model.{name}: expected as in the tuned model's tokenizer, found another" for name in names)
        elif one.get(key) != other.get(key):
            yield f"{key}: expected as in the tuned model's tokenizer, found another"
    if decoder(found) != decoder(wanted):
        yield "decoder: expected as in the tuned model's tokenizer, found another"


def _check_settings(found: Mapping[str, Path], wanted: Mapping[str, Path]) -> Check:
    own, theirs = settings(found), settings(wanted)
    wrong = []
    if SETTINGS in wanted and SETTINGS not in found:
        wrong.append(f"{SETTINGS}: expected beside the model, found none")
    for key in _SPEAKING if not wrong else ():
        if _plain(own.get(key)) != _plain(theirs.get(key)):
            wrong.append(
                f"{SETTINGS}: {key}: expected {_plain(theirs.get(key))!r:.60}, found {_plain(own.get(key))!r:.60}"
            )
    detail = wrong[0] if wrong else "as the tuned model's"
    return Check(name="tokenizer settings", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _plain(entry: Any) -> Any:
    """A token stands as a string or as a table with flags."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _check_templates(found: Mapping[str, Path], wanted: Mapping[str, Path]) -> Check:
    """Each template by its name with the same text, and one text where a folder has the default one twice."""
    own, theirs = templates(found), templates(wanted)
    wrong = [
        f"{name}: expected {'that of the tuned model' if name in theirs else 'none'}, found "
        f"{'another' if name in own else 'none'}"
        for name in sorted(own.keys() | theirs.keys())
        if own.get(name) != theirs.get(name)
    ]
    stated = settings(found).get("chat_template")
    twice = TEMPLATE in found and isinstance(stated, str) and stated != settings(wanted).get("chat_template")
    if twice and stated != own["default"]:
        wrong.append(f"{SETTINGS}: chat_template: expected the text of {TEMPLATE}, found another")
    detail = wrong[0] if wrong else f"{len(own)} as the tuned model has"
    return Check(name="chat template", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _check_generation(found: Mapping[str, Path], wanted: Mapping[str, Path]) -> Check:
    """Everything but the special ids, which follow the tokenizer and have a check of their own."""
    own, theirs = (read_object(files[GENERATION]) if GENERATION in files else {} for files in (found, wanted))
    free = SPECIAL_IDS | {"transformers_version", "_from_model_config"}
    wrong = [
        f"{GENERATION}: {key}: expected {theirs.get(key)!r:.60}, found {own.get(key)!r:.60}"
        for key in sorted((own.keys() | theirs.keys()) - free)
        if own.get(key) != theirs.get(key)
    ]
    if GENERATION in wanted and GENERATION not in found:
        wrong.append(f"{GENERATION}: expected beside the model, found none")
    detail = wrong[0] if wrong else "as the tuned model's"
    return Check(name="generation config", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
