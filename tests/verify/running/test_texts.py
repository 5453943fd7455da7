"""Tokenizers and templates in use: each check passes for a sound artifact and fails for a damaged one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.verify.expect.reference import Reference
from exporter.verify.run import verify
from exporter.verify.running.prompts import Sequences
from exporter.verify.running.texts import check_token_texts, run_texts
from tests.formats.gguf.models import SMOLLM, SPECIALS, checkpoint, config, tokenizer_json
from tests.formats.gguf.vocab.surroundings import write_vocabulary
from tests.verify.conftest import Tuned
from tests.verify.damage import corruptions, mutants_gguf, mutants_hf

GATES = {"encoding", "decoding", "rendered chats"}


def test_tokens_and_chats_that_become_other_texts_are_found(tuned: Tuned, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra: llamacpp)")
    rng = np.random.default_rng(0)
    folder, file = corruptions.copy(tuned.hf, tmp_path), corruptions.copy(tuned.gguf, tmp_path)
    for damage in (mutants_hf.lose_merges, mutants_hf.lose_decoder, mutants_hf.template):
        damage(folder, rng)
    for wrong in (mutants_gguf.rename_tokens, mutants_gguf.template):
        wrong(file, rng)
    paths = [tuned.gguf, folder, file]
    reports = verify(paths, Reference.open(tuned.base, [tuned.adapter]), level="full")
    passed, *failed = ({check.name: check.passed for check in report.checks} for report in reports)
    assert {name for name in GATES if passed.get(name)} == {"decoding", "rendered chats"}, "llama.cpp encodes by itself"
    assert {name for name in GATES if failed[0].get(name) is False} == GATES
    assert {name for name in GATES if failed[1].get(name) is False} == {"decoding", "rendered chats"}


@pytest.mark.models
def test_a_tokenizer_that_transformers_cannot_load_is_found(tuned: Tuned, tmp_path: Path) -> None:
    folder = corruptions.copy(tuned.hf, tmp_path)
    mutants_hf.edit(folder / "tokenizer.json", lambda content: content["model"].update(type="Nope"))
    (report,) = verify([folder], Reference.open(tuned.base, [tuned.adapter]), level="full")
    assert "encoding" in {check.name for check in report.failures}


def test_an_added_token_that_the_decoder_of_transformers_misreads_is_compared_by_its_text(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra: llamacpp)")
    tokens = ("naïve", "straße", "<süß>", "<lamp>")
    base = checkpoint(tmp_path / "base", config(vocab_size=276), tokenizer_json(SMOLLM, tokens))
    reference, (out, _) = Reference.open(base, []), write_vocabulary(base)
    ids = [91, 269, 92, 270, 271, 272]
    sequences = Sequences([], [], [], ["xnaïveystraße<süß><lamp>"], [ids], [269])
    results = run_texts({out: "gguf"}, reference, sequences, tmp_path / "run")
    assert results.outputs["tuned"]["encoded"] == [ids]
    assert results.outputs["tuned"]["plain"] == [*sequences.texts, *SPECIALS, *tokens]
    assert all(check.passed for check in check_token_texts(out, results, tmp_path / "texts"))
