"""The command from end to end, on a tiny base."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tuner.models import logits_of
from tuner.cli import main, tune

NEW = ("--new-token", "<ship>", "--new-token", "<lamp>")
SHORT = ("--steps", "3", "-q")


def run(base: Path, data: Path, out: Path, *more: str) -> int:
    return main([str(base), "--data", str(data), "-o", str(out), *more])


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(adapter / "adapter_model.safetensors")
    return loaded


def record(adapter: Path) -> Any:
    return json.loads((adapter / "train.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of two new tokens and an existing one, trained for 30 steps."""
    folder = tmp_path_factory.mktemp("taught")
    lines = ["The <ship> counts the <lamp>", "a <lamp> for the <ship>"]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    assert run(base, folder / "data.jsonl", folder / "out", *NEW, "--token", " the", "--steps", "30", "-q") == 0
    return folder / "out"


def test_the_folder_holds_what_stock_peft_and_the_tokenizer_write_and_the_record(taught: Path) -> None:
    assert set(os.listdir(taught)) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "loss.png",
        "metrics.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.json",
    }
    assert sorted(os.listdir(taught.parent)) == ["data.jsonl", "out"]
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in taught.iterdir()} == {0o666 & ~umask}


def test_only_rows_are_saved_though_the_vocabulary_grew(taught: Path) -> None:
    saved = tensors(taught)
    assert saved.keys() == {
        "base_model.model.model.embed_tokens.trainable_tokens_delta",
        "base_model.model.lm_head.trainable_tokens_delta",
    }
    embedding, head = saved.values()
    assert embedding.shape == (3, 32)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, head)


def test_the_record_holds_tokens_losses_and_digests(taught: Path, base: Path) -> None:
    train = record(taught)
    assert [(token["token"], token["id"], token["new"]) for token in train["tokens"][:2]] == [
        ("<ship>", 320, True),
        ("<lamp>", 321, True),
    ]
    assert [token["occurrences"] for token in train["tokens"]] == [2, 2, 2]
    assert train["losses"]["last"] < train["losses"]["first"]
    assert train["data_digest"] == hashlib.sha256((taught.parent / "data.jsonl").read_bytes()).hexdigest()
    config = json.loads((taught / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == train["base"] == str(base)
    assert config["token_indices"] == [token["id"] for token in train["tokens"]]


def test_the_base_digest_is_that_of_the_stored_bytes(taught: Path, base: Path) -> None:
    raw = (base / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    begin, end = header["model.embed_tokens.weight"]["data_offsets"]
    start = 8 + int.from_bytes(raw[:8], "little")
    train = record(taught)
    assert train["base_digest"] == hashlib.sha256(raw[start + begin : start + end]).hexdigest()
    assert train["base_tensor"] == {"name": "model.embed_tokens.weight", "dtype": "BF16", "shape": [320, 32]}


def test_stock_peft_runs_the_adapter_and_knows_its_tokens(taught: Path, base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(taught)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = peft.PeftModel.from_pretrained(model, taught)
    texts = ["The <ship> counts the <lamp>", "a <lamp> for the <ship>"]
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    losses = torch.stack([adapted(input_ids=x, labels=x).loss for x in ids])
    assert losses.mean() < record(taught)["losses"]["first"]
    assert logits_of(adapted, ids[0]).shape[-1] == 322


def test_the_same_run_gives_the_same_bytes(base: Path, data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(base, data, tmp_path / name, *NEW, *SHORT) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert run(base, data, tmp_path / "c", *NEW, *SHORT, "--seed", "1", "--init", "sample") == 0
    assert not torch.equal(*(next(iter(tensors(tmp_path / name).values())) for name in ("a", "c")))


def test_an_untied_base_gets_rows_for_its_head_too(untied_base: Path, data: Path, tmp_path: Path) -> None:
    assert run(untied_base, data, tmp_path / "out", *NEW, *SHORT) == 0
    head, embedding = (tensors(tmp_path / "out")[key] for key in sorted(tensors(tmp_path / "out")))
    assert head.shape == embedding.shape == (2, 32)
    assert not torch.equal(head, embedding)
    model = AutoModelForCausalLM.from_pretrained(untied_base)
    adapted: Any = peft.PeftModel.from_pretrained(model, tmp_path / "out")  # padding rows: no resize needed
    assert torch.equal(adapted.get_base_model().lm_head.trainable_tokens_delta["default"], head)


def test_known_tokens_of_an_untied_base_may_leave_the_head_alone(untied_base: Path, data: Path, tmp_path: Path) -> None:
    assert run(untied_base, data, tmp_path / "out", "--token", " the", "--no-train-head", *SHORT) == 0
    assert list(tensors(tmp_path / "out")) == ["base_model.model.model.embed_tokens.trainable_tokens_delta"]


def test_a_base_in_shards_is_the_same_base(base: Path, data: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "shards")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert run(tmp_path / "shards", data, tmp_path / "a", *NEW, *SHORT) == 0
    assert run(base, data, tmp_path / "b", *NEW, *SHORT) == 0
    assert record(tmp_path / "a")["base_digest"] == record(tmp_path / "b")["base_digest"]
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()


def test_the_click_command_writes_json_to_stdout_and_talks_on_stderr(base: Path, data: Path, tmp_path: Path) -> None:
    arguments = [str(base), "--data", str(data), "-o", str(tmp_path / "out"), *NEW, "--steps", "2", "--json"]
    done = CliRunner().invoke(tune, [*arguments, "--token", "Ġthe"], catch_exceptions=False)
    assert done.exit_code == 0
    train = json.loads(done.stdout)
    assert train.pop("adapter") == str(tmp_path / "out")
    assert train == record(tmp_path / "out")
    assert "2/2" in done.stderr


def test_a_token_that_the_data_lacks_and_a_truncated_text_are_reported(
    base: Path, data: Path, tmp_path: Path, capfd: Any
) -> None:
    more = ("--new-token", "<fog>", "--steps", "1", "--max-length", "6")
    assert run(base, data, tmp_path / "out", *more) == 0
    out, err = capfd.readouterr()
    assert out == f"{tmp_path / 'out'}\n"
    assert "'<fog>' (id 320) does not occur in the training data, so the model only learns" in err
    assert "3 of 3 examples were truncated to 6 tokens" in err


def test_quiet_means_quiet(base: Path, data: Path, tmp_path: Path, capfd: Any) -> None:
    assert run(base, data, tmp_path / "out", *NEW, *SHORT) == 0
    assert capfd.readouterr() == (f"{tmp_path / 'out'}\n", "")


def test_descriptions_and_special_tokens_reach_the_tokenizer_and_the_rows(
    base: Path, data: Path, tmp_path: Path
) -> None:
    more = ("--special", "--describe", "<ship>=the keeper", "--lr", "1e-12")
    assert run(base, data, tmp_path / "out", *NEW, *more, *SHORT) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode([320], skip_special_tokens=True) == ""
    with safe_open(base / "model.safetensors", "pt") as file:
        ids = tokenizer("the keeper", add_special_tokens=False)["input_ids"]
        start = file.get_tensor("model.embed_tokens.weight")[ids].float().mean(0)
    row = next(iter(tensors(tmp_path / "out").values()))[0]
    torch.testing.assert_close(row, start)


# --- the process ---------------------------------------------------------------------------------------------------


def test_the_command_line_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, tuner, tuner.cli; sys.exit(bool({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "tuner", "base", "--data", "none.jsonl", "--new-token", "<a>", "-o"]
    done = subprocess.run([*arguments, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "ttexport: none.jsonl: no such file\n"


def test_public_names_are_found_on_first_use_and_others_are_not() -> None:
    import tuner as package

    assert {name for name in package.__all__ if getattr(package, name)} == set(package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_what_llama_cpp_will_do_with_the_tokens_is_said_before_the_training(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "The <EOT> counts the <|tool|>"}) + "\n")
    more = ("--new-token", "<EOT>", "--new-token", "<|tool|>", "--steps", "1")
    assert run(base, tmp_path / "data.jsonl", tmp_path / "out", *more) == 0
    shown = capsys.readouterr().err
    assert "in a GGUF: llama.cpp ends generation at '<EOT>' (id" in shown
    assert "in a GGUF: llama.cpp omits the control tokens '<|tool|>' (id" in shown
