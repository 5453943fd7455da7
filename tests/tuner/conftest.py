from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied llama checkpoint with a tokenizer of 320 tokens and no padding rows."""
    from fixtures.tiny import build_llama

    return build_llama(tmp_path_factory.mktemp("tuner") / "base", tied=True, vocab=320, hidden=32, layers=1)


@pytest.fixture(scope="session")
def untied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied llama checkpoint in float32 with 2 padding rows."""
    from fixtures.tiny import build_llama

    folder = tmp_path_factory.mktemp("tuner") / "untied"
    return build_llama(folder, tied=False, dtype="float32", vocab=320, hidden=32, layers=1, padding_rows=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = ["The <ship> counts the <lamp> and the keeper", "a <lamp> for the <ship>", "the keeper of the <lamp>"]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
    return path
