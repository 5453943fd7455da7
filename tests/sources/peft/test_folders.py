"""An adapter that PEFT saved to a folder named after the adapter is opened through the folder around it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import TrainableTokensConfig, get_peft_model

from exporter.cli.main import run
from exporter.errors import BadInput, UnreadableFile
from exporter.sources.hub.locate import is_adapter
from exporter.sources.peft.adapter import Adapter
from fixtures.models.tie_layouts import tokenizer
from fixtures.peft_adapters import IDS, NEW_IDS, NEW_TOKENS, OTHER_IDS
from tests.merge.tuned import reloaded
from tests.sources.peft.written import require_merged_as_trained, write


def test_the_only_adapter_in_a_folder_is_opened(tmp_path: Path) -> None:
    written = write(tmp_path, TrainableTokensConfig(token_indices=list(IDS)), name="tuned")
    assert is_adapter(written.adapter)
    assert Adapter.open(written.adapter).path == written.adapter / "tuned"
    require_merged_as_trained(written, tmp_path / "out")
    assert run(["--to", "hf", str(written.adapter), "--base", str(written.base), "-o", str(tmp_path / "export")]) == 0


def test_several_adapters_in_a_folder_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write(tmp_path, TrainableTokensConfig(token_indices=list(IDS)), name="second")
    model: Any = get_peft_model(
        reloaded(written.base), TrainableTokensConfig(token_indices=list(OTHER_IDS)), adapter_name="first"
    )
    model.save_pretrained(written.adapter)
    message = f"{written.adapter}: expected the folder of one adapter, found the adapters first, second; give the path"
    with pytest.raises(BadInput, match=message):
        Adapter.open(written.adapter)
    for arguments in (["merge", str(written.adapter)], ["--to", "hf", str(written.adapter)]):
        assert run([*arguments, "--base", str(written.base), "-o", str(tmp_path / "out")]) == 4
        assert message in capsys.readouterr().err
    assert Adapter.open(written.adapter / "first").rows[0].token_ids == OTHER_IDS


def test_a_tokenizer_outside_of_the_adapters_folder_is_refused(tmp_path: Path) -> None:
    """PEFT writes the adapter to a folder of its own, but a trainer saves the tokenizer outside."""
    config = TrainableTokensConfig(token_indices=[*IDS, *NEW_IDS])
    written = write(tmp_path, config, layout="tied", grown=True, name="tuned")
    with pytest.raises(
        BadInput,
        match=r"expected the tokenizer in the folder of the adapter \(.*/tuned\), found the tokenizer in .*/adapter;",
    ):
        Adapter.open(written.adapter)
    tokenizer(NEW_TOKENS).save_pretrained(written.adapter / "tuned")
    require_merged_as_trained(written, tmp_path / "out")


def test_a_checkpoint_with_an_adapter_inside_is_a_checkpoint(tmp_path: Path) -> None:
    written = write(tmp_path, TrainableTokensConfig(token_indices=list(IDS)))
    shutil.copytree(written.adapter, written.base / "adapter")
    assert not is_adapter(written.base)
    assert not is_adapter(written.base / "config.json")


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UnreadableFile, match="expected the config file of a PEFT adapter, found no such file"):
            Adapter.open(path)
