"""A runtime forked from a process with its imports computes, and fails, as one in a fresh interpreter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from exporter.io import processes
from exporter.verify.runtimes.job import RuntimeFailed, run
from tests.session.warm import ForkServer, launch_fresh
from tests.verify.conftest import Tuned

pytestmark = pytest.mark.models
SEQUENCES = [[17, 300, 2, 5, 9], [4, 8, 15]]


def job_of(runtime: str, tuned: Tuned) -> dict[str, Any]:
    if runtime == "reference":
        vocab = json.loads((tuned.base / "config.json").read_text())["vocab_size"]
        job = {"checkpoint": str(tuned.base), "adapters": [str(tuned.adapter)], "vocab": vocab, "base_sequences": []}
        return job | {"sequences": {"F32": SEQUENCES, "BF16": SEQUENCES}, "continuations": {}}
    if runtime == "texts":
        job = {"folders": {"tuned": str(tuned.base)}, "ids": SEQUENCES, "texts": ["the lamp <|im_end|>"], "chats": []}
        return job | {"templates": {}, "folder templates": {"tuned": None}}
    artifact = tuned.hf if runtime == "merged" else tuned.gguf
    job = {"artifact": str(artifact), "sequences": SEQUENCES, "more": []}
    return job | {"greedy_prompts": SEQUENCES[:1], "greedy_tokens": 4, "texts": []}


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.mark.parametrize("runtime", ["reference", "merged", "gguf_in_transformers", "texts"])
def test_a_forked_runtime_computes_what_a_fresh_one_computes(
    runtime: str,
    tuned: Tuned,
    tmp_path: Path,
    warm_runtimes: Mapping[str, ForkServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, job = warm_runtimes[f"exporter.verify.runtimes.{runtime}"], job_of(runtime, tuned)
    before = server.served
    run(runtime, job, tmp_path / "forked")
    assert server.served == before + 1
    monkeypatch.setattr(processes, "launch", launch_fresh)
    run(runtime, job, tmp_path / "fresh")
    assert arrays(tmp_path / "forked") == arrays(tmp_path / "fresh") != {}


def test_a_forked_runtime_fails_with_the_words_of_a_fresh_one(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of("merged", tuned) | {"artifact": str(tmp_path / "nowhere")}
    with pytest.raises(RuntimeFailed) as forked:
        run("merged", job, tmp_path / "forked")
    monkeypatch.setattr(processes, "launch", launch_fresh)
    with pytest.raises(RuntimeFailed) as fresh:
        run("merged", job, tmp_path / "fresh")
    assert str(forked.value) == str(fresh.value)
