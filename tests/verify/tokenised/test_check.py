"""Texts with added tokens, tokenised by llama.cpp and by transformers: what differs is found, or named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from exporter.formats.gguf import writer
from exporter.sources.gguf.split_files import GgufModel
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check, Skip
from exporter.verify.tokenised import check
from tests.formats.gguf.models import SMOLLM, checkpoint, config, tokenizer_json
from tests.formats.gguf.vocab.surroundings import write_vocabulary
from tests.verify.damage import gguf_edit

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra: llamacpp)")
pytestmark = pytest.mark.models

NAMES = ("<unk>", "<s>", "</s>")
TOKENS = ("<lamp>", "foo bar", "bar bazinga", *NAMES)


def made(folder: Path, change: Callable[[dict[str, Any]], object] = lambda entry: None) -> tuple[Reference, Path]:
    """(a base with the added tokens ``TOKENS``, each changed by ``change``, a GGUF with the base's vocabulary)."""
    content = tokenizer_json(SMOLLM, TOKENS)
    for entry in content["added_tokens"]:
        change(entry)
    base = checkpoint(folder, config(vocab_size=269 + len(TOKENS)), content)
    return Reference.open(base, []), write_vocabulary(base)[0]


def outcomes(reference: Reference, path: Path) -> tuple[Check, list[str]]:
    """(the check, the reasons of known differences)."""
    found = list(check.check_tokenised(path, GgufModel.open(path), reference))
    (verdict,) = [item for item in found if isinstance(item, Check)]
    return verdict, [item.reason for item in found if isinstance(item, Skip)]


def test_tokens_that_overlap_are_a_known_difference_and_all_else_is_equal(tmp_path: Path) -> None:
    verdict, reasons = outcomes(*made(tmp_path / "base"))
    assert verdict.passed
    assert "texts with 10 taught and added tokens, and 8 rendered chats, have equal token ids" in verdict.detail
    (reason,) = reasons
    assert reason.startswith("llama.cpp matches the longest added token first")
    assert reason.endswith("texts differ, such as 'a foo bar bazinga b'")


def test_tokens_that_llama_cpp_does_not_match_are_found(tmp_path: Path) -> None:
    reference, path = made(tmp_path / "base")
    types = gguf_edit.values(path, "tokenizer.ggml.token_type")
    types[269] = 1  # <lamp> as an ordinary token
    gguf_edit.replace(path, writer.i32s("tokenizer.ggml.token_type", types))
    verdict, _ = outcomes(reference, path)
    assert not verdict.passed
    assert "'<lamp>': expected the token ids [269] from number 0 on, found [" in verdict.detail


def strip(entry: dict[str, Any], names: Sequence[str] | None = None) -> None:
    kept = ("<unk>", "<s>", "<|endoftext|>")
    entry["rstrip"] = entry["content"] in names if names is not None else entry["content"] not in kept


def test_whitespace_that_only_the_name_of_phi_3_drops_is_found(tmp_path: Path) -> None:
    reference, path = made(tmp_path / "base", strip)
    verdict, _ = outcomes(reference, path)
    assert not verdict.passed, "the GGUF has no name, so llama.cpp keeps the whitespace after each token"
    gguf_edit.add(path, writer.text("general.name", "My phi-3"))
    verdict, reasons = outcomes(reference, path)
    assert verdict.passed, verdict.detail
    assert len(reasons) == 1


def test_a_name_that_llama_cpp_misreads_is_found(tmp_path: Path) -> None:
    reference, path = made(tmp_path / "base")
    gguf_edit.add(path, writer.text("general.name", "not-a-Phi-3"))
    verdict, _ = outcomes(reference, path)
    assert not verdict.passed


def test_a_flag_that_no_name_can_express_is_a_known_difference(tmp_path: Path) -> None:
    verdict, reasons = outcomes(*made(tmp_path / "base", lambda entry: strip(entry, ["<lamp>"])))
    assert verdict.passed, verdict.detail
    assert any("no key for the flag rstrip of the added tokens '<lamp>'" in reason for reason in reasons)


def test_a_result_is_used_again_only_for_the_same_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Path] = []

    def record(path: Path, _: Reference) -> dict[str, Any]:
        runs.append(path)
        return {"texts": 1, "chats": 0, "tokens": 1, "differences": []}

    monkeypatch.setattr(check, "_results", {})
    monkeypatch.setattr(check, "_run", record)
    reference, path = made(tmp_path / "base")
    outcomes(reference, path)
    outcomes(reference, path)
    assert runs == [path]
    gguf_edit.add(path, writer.text("general.name", "other"))
    outcomes(reference, path)
    other, path = made(tmp_path / "other", strip)
    outcomes(other, path)
    assert len(runs) == 3


def test_a_vocabulary_that_llama_cpp_cannot_load_is_found(tmp_path: Path) -> None:
    reference, path = made(tmp_path / "base")
    gguf_edit.replace(path, writer.text("tokenizer.ggml.pre", "unheard-of"))
    verdict, _ = outcomes(reference, path)
    assert not verdict.passed
    assert "llama.cpp cannot load the vocabulary" in verdict.detail


def test_a_missing_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, path = made(tmp_path / "base")
    monkeypatch.setattr(check, "installed", lambda name: False)
    (skip,) = check.check_tokenised(path, GgufModel.open(path), reference)
    assert isinstance(skip, Skip)
    assert skip.reason == "llama-cpp-python not installed"


def test_a_tokenizer_that_transformers_cannot_load_is_told(tmp_path: Path) -> None:
    reference, path = made(tmp_path / "base")
    settings = reference.auxiliary_files["tokenizer_config.json"]
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"extra_special_tokens": 7}))
    found = list(check.check_tokenised(path, GgufModel.open(path), reference))
    assert "transformers cannot use the tuned model's tokenizer" in str(found)
