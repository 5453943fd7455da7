"""Notes on taught tokens in the plan and the report of a merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.cli.main import run
from fixtures import adapters

NEW = ("<EOT>", "<lamp>", "foo bar", "bar bazinga")


@pytest.fixture(scope="module")
def adapter(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.stock_rows_new_tokens(tiny_tied, tmp_path_factory.mktemp("taught") / "adapter", NEW, [1])


def test_plan_and_merge_name_the_tokens(
    tiny_tied: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(adapter), "--base", str(tiny_tied), "--to", "gguf"]
    assert run(["plan", *words, "--json"]) == 0
    (target,) = json.loads(capsys.readouterr().out)["targets"]
    ends, hides, overlaps = (note for note in target["notes"] if note.startswith(("llama.cpp", "where")))
    assert ends == "llama.cpp ends generation at '<EOT>' (id 512) because of the text, but transformers does not"
    assert hides.startswith("llama.cpp omits the control tokens '<|im_start|>' (id 1) from printed text")
    assert overlaps.startswith("where 'foo bar' and 'bar bazinga' overlap, llama.cpp matches the longest token")
    assert run(["merge", *words, "--verify", "off", "-o", str(tmp_path / "out.gguf")]) == 0
    assert f"  note: {ends}\n" in capsys.readouterr().err


def test_tokens_of_the_base_that_nobody_taught_are_not_noted(
    tiny_tied: Path, tiny_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(tiny_tied), "--to", "gguf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["targets"][0]["notes"] == []
