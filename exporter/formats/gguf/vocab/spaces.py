"""Determine from the structure of tokenizer.json how a SentencePiece tokenizer treats spaces.

llama.cpp can add a space before each text, merge runs of spaces and, for unigram models, apply a character map. Known
differences between llama.cpp and transformers in the treatment of spaces are reported as notes.
Sources: the converters in transformers' convert_slow_tokenizer.py, the tokenizers in transformers' folders llama, gemma
and t5, and llama_vocab::impl::tokenize in llama.cpp.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.formats.gguf.vocab.normalizers import NFC_NOTE, normalizer_steps

Step = tuple[object, ...]

_MARK: Final = "\u2581"
_TO_MARK: Final[Step] = ("Replace", " ", _MARK)
_PREPEND: Final[Step] = ("Prepend", _MARK)
_WORDS: Final[Step] = ("WhitespaceSplit",)
#: A split at spaces, which has no effect because all spaces have been replaced by marks.
_NO_SPLIT: Final[Step] = ("Split", " ", "MergedWithPrevious", False)
#: Steps that merge a run of spaces: into a mark, or into a space that Metaspace then replaces by a mark.
_RUNS: Final = (("Replace", " {2,}", _MARK), ("Replace", " {2,}", " "))
_STRIP: Final[Step] = ("Strip", False, True)

#: (normalizer, pre-tokenizer) of a BPE model → True if a space is added before a text.
_BPE: Final[Mapping[tuple[tuple[Step, ...], tuple[Step, ...]], bool]] = {
    ((_PREPEND, _TO_MARK), ()): True,  # llama 2, mistral and phi3 in files of transformers 4
    ((_TO_MARK,), ()): False,
    ((_TO_MARK,), (_NO_SPLIT,)): False,  # gemma
    ((), (("Metaspace", _MARK, "always", False),)): True,  # transformers 5, and transformers 4 with legacy=False
    ((), (("Metaspace", _MARK, "first", False),)): True,
    ((), (("Metaspace", _MARK, "never", False),)): False,
}

_LEADING: Final = "llama.cpp adds a space even to a text that begins with a space, but this tokenizer does not"
_AFTER: Final = (
    "llama.cpp adds a space to the text after each special token, "
    "but this tokenizer adds a space only at the start of the input"
)
UNMAPPED: Final = "this tokenizer normalises characters, but llama.cpp does not normalise the text of a BPE model"
_BREAKS: Final = "this tokenizer treats line breaks and tabs as spaces, but llama.cpp treats both as unknown characters"


@dataclass(frozen=True, slots=True)
class Spaces:
    """A description of how a SentencePiece tokenizer treats spaces.

    prefix: whether a space is added before each text. merged: whether each run of spaces is replaced by a single space,
    and spaces at the start and end of a text are dropped. charsmap: SentencePiece's compiled character map, or b"" if
    absent. notes: differences between transformers and llama.cpp.
    """

    prefix: bool
    merged: bool = False
    charsmap: bytes = b""
    notes: tuple[str, ...] = ()


def read_spaces(content: Mapping[str, Any], where: str, *, unigram: bool) -> Spaces:
    """Determine from a parsed tokenizer.json how the tokenizer treats spaces.

    Raises NotExpressible if llama.cpp does not support the structure of the tokenizer; the message contains the
    structure.
    """
    steps = normalizer_steps(content.get("normalizer"))
    kept = [step for step in steps if not (isinstance(step, Mapping) and step.get("type") == "NFC")]
    normalizer, charsmap = _without_map([step for node in kept for step in _steps(node, "normalizers")])
    pre_tokenizer = tuple(_steps(content.get("pre_tokenizer"), "pretokenizers"))
    spaces = _unigram(normalizer, pre_tokenizer) if unigram else _bpe(normalizer, pre_tokenizer)
    if spaces is None or charsmap is None:
        structure = json.dumps({key: content.get(key) for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)
        raise NotExpressible(
            f"gguf: {where}",
            f"llama.cpp does not support this SentencePiece tokenizer's treatment of spaces: {structure:.500}",
            instead="use --to hf or --to onnx to export this model",
        )
    notes = spaces.notes + ((NFC_NOTE,) if len(kept) < len(steps) else ())
    if unigram and _WORDS in pre_tokenizer and not charsmap:
        notes += (_BREAKS,)
    if charsmap and not unigram:
        notes += (UNMAPPED,)
    return Spaces(spaces.prefix, spaces.merged, charsmap, notes)


def spaces_of_class(settings: Mapping[str, Any], model_type: object) -> dict[str, Any]:
    """Return the normalizer and the pre-tokenizer that transformers' tokenizer class uses instead of the file's.

    settings: the parsed tokenizer_config.json. The result is empty if transformers uses the parts of the file. The
    class LlamaTokenizer always treats spaces in its own way. For model types other than llama, transformers does not
    use this class, even if tokenizer_config.json names the class. Source: ``LlamaTokenizer.__init__`` and
    ``AutoTokenizer.from_pretrained`` in transformers.
    """
    if str(settings.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer" or model_type != "llama":
        return {}
    prefixed = settings.get("add_prefix_space") in (None, True)
    scheme = "never" if not prefixed else "always" if settings.get("legacy") else "first"
    metaspace = {"type": "Metaspace", "replacement": _MARK, "prepend_scheme": scheme, "split": False}
    return {"normalizer": None, "pre_tokenizer": metaspace}


def _bpe(normalizer: tuple[Step, ...], pre_tokenizer: tuple[Step, ...]) -> Spaces | None:
    prefix = _BPE.get((normalizer, pre_tokenizer))
    if prefix is None:
        return None
    scheme = pre_tokenizer[0][2] if pre_tokenizer and pre_tokenizer[0][0] == "Metaspace" else None
    notes = {"always": (_LEADING,), "first": (_LEADING, _AFTER)}.get(str(scheme), ())
    return Spaces(prefix, notes=notes)


def _unigram(normalizer: tuple[Step, ...], pre_tokenizer: tuple[Step, ...]) -> Spaces | None:
    runs = any(step in _RUNS for step in normalizer)
    merged = runs or _WORDS in pre_tokenizer
    known = all(step in _RUNS or (step == _STRIP and merged) for step in normalizer)
    if not known or not pre_tokenizer or pre_tokenizer[:-1] not in ((), (_WORDS,)):
        return None
    scheme = pre_tokenizer[-1][2] if pre_tokenizer[-1][::3] == ("Metaspace", True) else None
    if scheme not in ("always", "first", "never") or (merged and scheme == "never"):
        return None  # llama.cpp cannot merge runs of spaces without adding a space before a text
    return Spaces(scheme != "never", merged, notes=(_AFTER,) if scheme == "first" else ())


def _without_map(steps: Sequence[Step]) -> tuple[tuple[Step, ...], bytes | None]:
    """Split a normalizer into (its steps without a leading character map, the character map or b"" if there is none).

    If the character map is not valid base64, None is returned in place of the map.
    """
    if not steps or steps[0][0] != "Precompiled":
        return tuple(steps), b""
    try:
        return tuple(steps[1:]), base64.b64decode(str(steps[0][1] or ""), validate=True)
    except (binascii.Error, ValueError):
        return (), None


def _steps(node: Any, children: str) -> list[Step]:
    """Return the steps of a normalizer or pre-tokenizer in a canonical form.

    In the canonical form, nested sequences are flattened, and equivalent steps are written in the same way.
    """
    if not isinstance(node, Mapping):
        return []
    step_type, pattern = node.get("type"), node.get("pattern")
    if step_type == "Sequence" and isinstance(node.get(children), list):
        return [step for child in node[children] for step in _steps(child, children)]
    text = next(iter(pattern.values()), None) if isinstance(pattern, Mapping) else pattern
    if step_type == "Prepend":
        return [(step_type, node.get("prepend"))]
    if step_type == "Replace":
        return [(step_type, text, node.get("content"))]
    if step_type == "Precompiled":
        return [(step_type, node.get("precompiled_charsmap"))]
    if step_type == "Strip":
        return [(step_type, node.get("strip_left"), node.get("strip_right"))]
    if step_type == "Split":
        return [(step_type, text, node.get("behavior"), node.get("invert", False))]
    if step_type == "Metaspace":
        # Older files have a flag instead of a scheme's name.
        scheme = node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")
        return [(step_type, node.get("replacement"), scheme, node.get("split", True))]
    return [(step_type,)] if step_type == "WhitespaceSplit" else [(json.dumps(node, sort_keys=True),)]
