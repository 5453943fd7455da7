"""Model types that the generated tables lack are described by the installed transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.models import architecture, facts, unlisted

CONFIG = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}


@pytest.fixture
def without_mamba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables of an older transformers without the model type mamba; the path is the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(unlisted, "transformers_version", lambda: "5.0.0")
    monkeypatch.setattr(architecture, "type_facts", lambda name: None if name == "mamba" else facts.type_facts(name))
    unlisted.unlisted_facts.cache_clear()
    yield tmp_path
    unlisted.unlisted_facts.cache_clear()


@pytest.mark.slow
def test_a_type_of_a_newer_transformers_is_described_and_cached(without_mamba: Path) -> None:
    described = architecture.Architecture.of(CONFIG)
    assert described is not None
    assert (described.embedding, described.head) == ("backbone.embeddings", "lm_head")
    listed = facts.type_facts("mamba")
    assert listed is not None
    assert described.facts == listed.classes["MambaForCausalLM"] or described.parameters
    (kept,) = (without_mamba / "ttexport" / "models").rglob("*.json")
    unlisted.unlisted_facts.cache_clear()
    kept.write_text(kept.read_text().replace('"backbone.embeddings"', '"backbone.from_the_cache"'))
    again = architecture.Architecture.of(CONFIG)
    assert again is not None
    assert again.embedding == "backbone.from_the_cache"


def test_a_type_that_transformers_does_not_know_has_no_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert architecture.Architecture.of({"model_type": "novel", "architectures": ["NovelForCausalLM"]}) is None
    assert not list(tmp_path.iterdir())  # the tables are those of the installed version: no process is started


@pytest.mark.parametrize("model_type", ["../conversions", "conversions", "classes", "", 7, None, ["llama"]])
def test_a_hostile_model_type_has_no_facts(model_type: object) -> None:
    assert architecture.Architecture.of({"model_type": model_type}) is None
