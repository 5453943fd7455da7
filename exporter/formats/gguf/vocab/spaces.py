"""How a SentencePiece tokenizer treats spaces, told from the structure of tokenizer.json.

llama.cpp knows two switches, a space put before a text and runs of spaces made one; and a map of characters for
unigram models. What transformers does beyond these is said in a note.
Source: the converters in transformers' convert_slow_tokenizer.py, the tokenizers of its llama, gemma and t5 folders,
and llama.cpp's llama_vocab::impl::tokenize.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from exporter.errors import NotExpressible

Step = tuple[object, ...]

_MARK: Final = "\u2581"
_TO_MARK: Final[Step] = ("Replace", " ", _MARK)
_PREPEND: Final[Step] = ("Prepend", _MARK)
_WORDS: Final[Step] = ("WhitespaceSplit",)
#: After spaces have become marks there is no space left to cut at.
_NO_CUT: Final[Step] = ("Split", " ", "MergedWithPrevious", False)
#: Runs of spaces made one. The first form leaves the mark, the second the space, which Metaspace then replaces.
_RUNS: Final = (("Replace", " {2,}", _MARK), ("Replace", " {2,}", " "))
_STRIP: Final[Step] = ("Strip", False, True)

#: (normalizer, pre-tokenizer) of a BPE model → whether a space is put before a text.
_BPE: Final[Mapping[tuple[tuple[Step, ...], tuple[Step, ...]], bool]] = {
    ((_PREPEND, _TO_MARK), ()): True,  # llama 2, mistral, phi3 as transformers 4 wrote them
    ((_TO_MARK,), ()): False,
    ((_TO_MARK,), (_NO_CUT,)): False,  # gemma
    ((), (("Metaspace", _MARK, "always", False),)): True,  # transformers 5, and transformers 4 with legacy=False
    ((), (("Metaspace", _MARK, "first", False),)): True,
    ((), (("Metaspace", _MARK, "never", False),)): False,
}

_LEADING: Final = "a text that begins with a space: llama.cpp puts one more before it, this tokenizer does not"
_AFTER: Final = "text after a special token: llama.cpp puts a space before it, this tokenizer does so at the start only"
_UNMAPPED: Final = "characters: llama.cpp does not normalise the text of a BPE model, this tokenizer does"
_BREAKS: Final = "line breaks and tabs: unknown characters to llama.cpp, spaces to this tokenizer"


@dataclass(frozen=True, slots=True)
class Spaces:
    """prefix: a space is put before a text. merged: runs are made one, and those at the ends dropped.

    charsmap: SentencePiece's compiled map of characters, b"" for none. notes: what llama.cpp does otherwise.
    """

    prefix: bool
    merged: bool = False
    charsmap: bytes = b""
    notes: tuple[str, ...] = ()


def read_spaces(content: Mapping[str, Any], where: str, *, unigram: bool) -> Spaces:
    """The treatment that a parsed tokenizer.json describes. Raises NotExpressible, with the structure, for another."""
    normalizer, charsmap = _without_map(_steps(content.get("normalizer"), "normalizers"))
    cutting = tuple(_steps(content.get("pre_tokenizer"), "pretokenizers"))
    found = _unigram(normalizer, cutting) if unigram else _bpe(normalizer, cutting)
    if found is None or charsmap is None:
        shown = json.dumps({key: content.get(key) for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)
        raise NotExpressible(
            f"gguf: {where}",
            f"llama.cpp does not treat spaces as this SentencePiece tokenizer: {shown:.500}",
            instead="--to hf and --to onnx can hold it",
        )
    notes = found.notes
    if unigram and _WORDS in cutting and not charsmap:
        notes += (_BREAKS,)
    if charsmap and not unigram:
        notes += (_UNMAPPED,)
    return Spaces(found.prefix, found.merged, charsmap, notes)


def _bpe(normalizer: tuple[Step, ...], cutting: tuple[Step, ...]) -> Spaces | None:
    prefix = _BPE.get((normalizer, cutting))
    if prefix is None:
        return None
    scheme = cutting[0][2] if cutting and cutting[0][0] == "Metaspace" else None
    notes = {"always": (_LEADING,), "first": (_LEADING, _AFTER)}.get(str(scheme), ())
    return Spaces(prefix, notes=notes)


def _unigram(normalizer: tuple[Step, ...], cutting: tuple[Step, ...]) -> Spaces | None:
    runs = any(step in _RUNS for step in normalizer)
    merged = runs or _WORDS in cutting
    known = all(step in _RUNS or (step == _STRIP and merged) for step in normalizer)
    if not known or not cutting or cutting[:-1] not in ((), (_WORDS,)):
        return None
    scheme = cutting[-1][2] if cutting[-1][::3] == ("Metaspace", True) else None
    if scheme not in ("always", "first", "never") or (merged and scheme == "never"):
        return None  # where llama.cpp merges runs of spaces, it also puts one before a text
    return Spaces(scheme != "never", merged, notes=(_AFTER,) if scheme == "first" else ())


def _without_map(steps: Sequence[Step]) -> tuple[tuple[Step, ...], bytes | None]:
    """(all steps but a map of characters at the start, that map). None for one that is not base64."""
    if not steps or steps[0][0] != "Precompiled":
        return tuple(steps), b""
    try:
        return tuple(steps[1:]), base64.b64decode(str(steps[0][1] or ""), validate=True)
    except (binascii.Error, ValueError):
        return (), None


def _steps(node: Any, children: str) -> list[Step]:
    """Sequences flattened, and one spelling for what can be said in several."""
    if not isinstance(node, Mapping):
        return []
    kind, pattern = node.get("type"), node.get("pattern")
    if kind == "Sequence" and isinstance(node.get(children), list):
        return [step for child in node[children] for step in _steps(child, children)]
    text = next(iter(pattern.values()), None) if isinstance(pattern, Mapping) else pattern
    if kind == "Prepend":
        return [(kind, node.get("prepend"))]
    if kind == "Replace":
        return [(kind, text, node.get("content"))]
    if kind == "Precompiled":
        return [(kind, node.get("precompiled_charsmap"))]
    if kind == "Strip":
        return [(kind, node.get("strip_left"), node.get("strip_right"))]
    if kind == "Split":
        return [(kind, text, node.get("behavior"), node.get("invert", False))]
    if kind == "Metaspace":
        # Older files have a flag where newer ones name a scheme.
        scheme = node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")
        return [(kind, node.get("replacement"), scheme, node.get("split", True))]
    return [(kind,)] if kind == "WhitespaceSplit" else [(json.dumps(node, sort_keys=True),)]
