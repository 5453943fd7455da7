"""The tables of token texts, compared with the installed llama.cpp, and the notes made from the tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from exporter.formats.gguf import writer
from exporter.sources.hf.by_llama_cpp.tokens import (
    ENDS,
    FILL_CONTROLS,
    FILL_ENDS,
    NO_ENDS,
    SHOWN,
    MatchedToken,
    ends_generation,
    token_notes,
)
from exporter.sources.hf.sentencepiece import CONTROL, NORMAL, USER_DEFINED
from tests.formats.gguf.models import byte_symbols

BYTES = byte_symbols()
FIRST = len(BYTES)
#: Texts in llama.cpp's library that have the form of a special token.
SPECIAL_FORM = re.compile(rb"(?<=\0)(?:[<\[_]|\xe2\x96\x81)[^\0\s]{1,40}[>\]\[](?=\0)")


@pytest.fixture(scope="module")
def runtime() -> ModuleType:
    module: ModuleType = pytest.importorskip(
        "tests.formats.gguf.runtime", reason="llama-cpp-python is not installed", exc_type=ImportError
    )
    return module


def vocabulary_file(path: Path, texts: Sequence[str], token_type: int) -> Path:
    """A GGUF with the bytes' symbols and then ``texts``, without tensors."""
    tokens = [*BYTES, *texts]
    keys = [
        writer.text("general.architecture", "llama"),
        writer.text("tokenizer.ggml.model", "gpt2"),
        writer.text("tokenizer.ggml.pre", "gpt-2"),
        writer.texts("tokenizer.ggml.tokens", tokens),
        writer.i32s("tokenizer.ggml.token_type", [NORMAL] * FIRST + [token_type] * len(texts)),
        writer.texts("tokenizer.ggml.merges", ["a b"]),
        *(writer.u32(f"tokenizer.ggml.{role}_token_id", 0) for role in ("bos", "eos")),
    ]
    path.write_bytes(writer.header(keys, [])[0])
    return path


def candidates() -> list[str]:
    """The texts of all tables, and all texts in the library that look like a special token."""
    llama_cpp = pytest.importorskip("llama_cpp")
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("*llama.*")).read_bytes()
    found = {text.decode("utf-8", "replace") for text in SPECIAL_FORM.findall(library)}
    assert len(found & ENDS) > 15, "the library no longer stores the texts of ends in a readable form"
    return sorted(found | ENDS | FILL_ENDS | FILL_CONTROLS | SHOWN)


def test_the_tables_equal_the_lists_of_the_installed_llama_cpp(runtime: ModuleType, tmp_path: Path) -> None:
    ends, controls, shown = set(), set(), set()
    for text in candidates():
        seen = runtime.token_kinds(vocabulary_file(tmp_path / "ends.gguf", [text], USER_DEFINED))[FIRST]
        ends |= {text} if seen.ends else set()
        controls |= {text} if seen.control else set()
        seen = runtime.token_kinds(vocabulary_file(tmp_path / "shown.gguf", [text], CONTROL))[FIRST]
        shown |= set() if seen.control else {text}
    assert ends == ENDS | FILL_ENDS
    assert controls == ENDS | FILL_ENDS | FILL_CONTROLS
    assert shown == SHOWN


def test_llama_cpp_drops_an_end_beside_exactly_the_groups_of_the_table(runtime: ModuleType, tmp_path: Path) -> None:
    others = sorted({name for _, groups in NO_ENDS for group in groups for name in group})
    for text, groups in NO_ENDS:
        for number, first in enumerate(others):
            for second in others[number:]:
                vocabulary = {text, first, second}
                path = vocabulary_file(tmp_path / "ends.gguf", sorted(vocabulary), CONTROL)
                seen = runtime.token_kinds(path)[FIRST + sorted(vocabulary).index(text)]
                assert seen.ends is ends_generation(text, vocabulary), (text, first, second)
                assert seen.ends is not any(group <= vocabulary for group in groups)


def notes(
    *texts: str, ends: Sequence[str] = (), taught: Sequence[str] | None = None, control: bool = False
) -> list[str]:
    vocabulary = {text: index for index, text in enumerate(texts)}
    matched = [MatchedToken(index, text, control=control) for text, index in vocabulary.items()]
    ids = {vocabulary[text] for text in (texts if taught is None else taught)}
    return token_notes(vocabulary, matched, ids, {vocabulary[text] for text in ends})


@pytest.mark.parametrize("text", ["<EOT>", "<|call|>", "[EOS]", "<|return|>", "<end_of_turn>", "<|file_sep|>", "<PAD>"])
def test_a_taught_token_at_which_llama_cpp_ends_generation_is_noted(text: str) -> None:
    assert notes("<lamp>", text) == [
        f"llama.cpp ends generation at {text!r} (id 1) because of the text, but transformers does not"
    ]
    assert notes("<lamp>", text, ends=[text]) == []
    assert notes("<lamp>", text, taught=["<lamp>"]) == []


def test_an_end_that_llama_cpp_drops_is_noted() -> None:
    (stops, lost) = notes("<|end|>", "<|call|>", "<|return|>", ends=["<|end|>"], taught=["<|call|>", "<|return|>"])
    assert stops.startswith("llama.cpp ends generation at '<|call|>' (id 1) and '<|return|>' (id 2) because")
    assert lost == (
        "llama.cpp does not end generation at the end-of-sequence token '<|end|>' (id 0), "
        "because the vocabulary also contains '<|call|>' (id 1) and '<|return|>' (id 2)"
    )
    assert not any("does not end" in note for note in notes("<|end|>", "<|call|>"))


def test_tokens_that_llama_cpp_hides_or_always_prints_are_noted() -> None:
    assert notes("<|tool|>", control=True) == [
        "llama.cpp omits the control tokens '<|tool|>' (id 0) from printed text, unless a program asks for them"
    ]
    assert notes("<tool>") == []
    assert notes("<|channel|>", control=True) == [
        "llama.cpp always prints '<|channel|>' (id 0), because llama.cpp does not treat the text as a control token"
    ]


def test_a_note_names_six_tokens_and_counts_the_others() -> None:
    (note,) = notes(*(f"<|t{index}|>" for index in range(30)), control=True)
    assert "'<|t5|>' (id 5) and 24 more from" in note


def test_a_model_without_taught_tokens_has_no_notes() -> None:
    assert notes("<EOT>", taught=[]) == []
