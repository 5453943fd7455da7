"""Requests that ``tune`` refuses with an exit code and one line, writing nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config

from tuner.cli import main

NEW = ("--new-token", "<ship>", "--new-token", "<lamp>")


def refused(
    capfd: Any, code: int, message: str, base: Path | str, data: Path, *more: str, out: Path | None = None
) -> None:
    out = out or data.parent / "refused"
    before = sorted(os.listdir(data.parent))
    assert main([str(base), "--data", str(data), "-o", str(out), "-q", *more]) == code
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert message in stderr
    assert stderr.startswith("ttexport: ")
    assert stderr.count("\n") == 1
    assert sorted(os.listdir(data.parent)) == before


def test_no_token_to_train_is_bad_input(base: Path, data: Path, capfd: Any) -> None:
    refused(capfd, 4, "expected at least one token to train (--new-token or --token), found no token", base, data)


def test_a_model_without_token_embeddings_is_bad_input(base: Path, data: Path, tmp_path: Path, capfd: Any) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8)
    folder = tmp_path / "vision"
    ViTModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    refused(capfd, 4, "ViTConfig", folder, data, *NEW)


def test_a_token_beyond_the_embedding_is_bad_input(base: Path, data: Path, tmp_path: Path, capfd: Any) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "short"))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": 320, "content": "<far>", **flags})
    path.write_text(json.dumps(tokenizer))
    refused(capfd, 4, "'<far>': expected an id below 320", folder, data, "--token", "<far>")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--new-token", "<|im_end|>"), 4, "'<|im_end|>': expected a new token, found an existing token (id 2)"),
        (("--new-token", "<a>", "--new-token", "<a>"), 4, "expected distinct tokens, found the same token twice"),
        (("--token", "lighthouse keeper"), 4, "'lighthouse keeper': expected a text that encodes to one token, found"),
        (("--token", " the", "--token", "Ġthe"), 4, "expected distinct tokens, found id"),
        (("--token", ""), 4, "found an empty text"),
        ((*NEW, "--describe", "<ship>"), 2, "expected T=TEXT"),
        ((*NEW, "--describe", "<x>=text"), 4, "expected a token that is also given with --new-token"),
        ((*NEW, "--steps", "1", "--epochs", "1"), 2, "--steps and --epochs are mutually exclusive"),
        ((*NEW, "--lr", "0"), 2, "--lr: expected a finite number greater than 0"),
        ((*NEW, "--lr", "nan"), 2, "--lr: expected a finite number greater than 0"),
        ((*NEW, "--warmup", "1"), 2, "--warmup: expected a fraction in [0, 1)"),
        ((*NEW, "--eval-share", "1"), 2, "--eval-share: expected a fraction in (0, 1)"),
        ((*NEW, "--eval-share", "0.9"), 4, "expected more than 3 examples if --eval-share is 0.9, found 3"),
        ((*NEW, "--eval-share", "0.5", "--eval-data", "x"), 2, "--eval-data and --eval-share are mutually exclusive"),
        ((*NEW, "--eval-data", "x"), 4, "x: no such file"),
        (
            (*NEW, "--patience", "1"),
            2,
            "--patience: expected evaluation examples, found no examples; use --eval-data or --eval-share",
        ),
        (
            (*NEW, "--eval-every", "1"),
            2,
            "--eval-every: expected evaluation examples, found no examples; use --eval-data or --eval-share",
        ),
        ((*NEW, "--eval-share", "0.5", "--patience", "1", "--save-every", "3"), 2, "a multiple of --eval-every"),
        ((*NEW, "--lora-targets", "q_proj"), 2, "--lora-targets: expected the option --lora-rank too"),
        ((*NEW, "--lora-rank", "2", "--lora-targets", "nothing"), 4, "--lora-targets: Target modules"),
        (
            (*NEW, "--max-length", "1"),
            4,
            "data.jsonl: expected an example with a token to learn among its first 1 tokens",
        ),
    ],
)
def test_requests_that_cannot_be_met(
    arguments: tuple[str, ...], code: int, message: str, base: Path, data: Path, capfd: Any
) -> None:
    refused(capfd, code, message, base, data, *arguments)


def test_a_new_token_without_head_rows_is_refused_on_an_untied_base(untied_base: Path, data: Path, capfd: Any) -> None:
    refused(
        capfd, 2, "--no-train-head: remove this option, because new tokens", untied_base, data, *NEW, "--no-train-head"
    )


def test_broken_data_is_named_by_line(base: Path, data: Path, capfd: Any) -> None:
    data.write_text('{"text": "a"}\n{"text": \n')
    refused(capfd, 4, f"{data}:2: expected valid JSON", base, data, *NEW)
    data.unlink()
    data.touch()
    refused(capfd, 4, f"{data}: expected at least one line", base, data, *NEW)


def test_example_types_are_not_mixed(base: Path, data: Path, capfd: Any) -> None:
    data.write_text('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n')
    refused(capfd, 4, f'{data}:2: expected example type "text" as in line 1, found "prompt"', base, data, *NEW)
    (data.parent / "eval.jsonl").write_text('{"test": "a"}\n')
    data.write_text('{"text": "a"}\n')
    refused(capfd, 4, "eval.jsonl:1: expected", base, data, *NEW, "--eval-data", str(data.parent / "eval.jsonl"))


def test_an_existing_output_is_refused_and_an_input_never_replaced(base: Path, data: Path, capfd: Any) -> None:
    (data.parent / "there").mkdir()
    refused(capfd, 7, "the output exists already", base, data, *NEW, out=data.parent / "there")
    refused(capfd, 2, "expected an output path that overwrites no input", base, data, *NEW, out=data)
    refused(capfd, 2, "expected an output path that overwrites no input", base, data, *NEW, "--force", out=base)


@pytest.fixture
def broken(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "broken"))


def test_a_base_without_config(broken: Path, data: Path, capfd: Any) -> None:
    (broken / "config.json").unlink()
    refused(capfd, 4, "config.json: no such file", broken, data, *NEW)


def test_a_base_with_a_broken_config(broken: Path, data: Path, capfd: Any) -> None:
    (broken / "config.json").write_text("{")
    refused(capfd, 4, "config.json is not valid JSON", broken, data, *NEW)


def test_a_base_that_does_not_exist(data: Path, capfd: Any) -> None:
    refused(
        capfd,
        4,
        "BASE: nowhere/model@main: found neither as a local folder nor in the local cache",
        "nowhere/model",
        data,
        *NEW,
    )


def test_a_base_without_weights(broken: Path, data: Path, capfd: Any) -> None:
    (broken / "model.safetensors").unlink()
    refused(
        capfd, 4, "expected model.safetensors or model.safetensors.index.json, found no such file", broken, data, *NEW
    )


def test_pickled_weights_are_refused_with_the_conversion(broken: Path, data: Path, capfd: Any) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    refused(capfd, 4, "pytorch_model.bin: expected model.safetensors, found pickled weights", broken, data, *NEW)


def test_truncated_weights(broken: Path, data: Path, capfd: Any) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(capfd, 4, str(broken), broken, data, *NEW)


def test_missing_weights_are_not_replaced_by_noise(broken: Path, data: Path, capfd: Any) -> None:
    stored = load_file(broken / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight"]
    save_file(stored, broken / "model.safetensors", metadata={"format": "pt"})
    refused(
        capfd,
        4,
        "broken: expected a tensor named model.layers.0.mlp.up_proj.weight, found no such tensor",
        broken,
        data,
        *NEW,
    )


def test_a_matrix_that_contradicts_the_config(broken: Path, data: Path, capfd: Any) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 319}))
    refused(capfd, 4, str(broken), broken, data, *NEW)


def test_remote_code_is_not_run(broken: Path, data: Path, capfd: Any) -> None:
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "own.py").write_text("raise SystemExit('this ran')")
    refused(capfd, 4, str(broken), broken, data, *NEW)


def test_a_token_whose_id_has_no_row(broken: Path, data: Path, capfd: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(broken)
    tokenizer.add_tokens(["<late>"])
    tokenizer.save_pretrained(broken)
    refused(
        capfd,
        4,
        "expected an id below 320, the number of rows of the embedding, found 320",
        broken,
        data,
        "--token",
        "<late>",
    )


def test_encoder_decoder_models_are_out_of_scope(broken: Path, data: Path, capfd: Any) -> None:
    sizes: dict[str, Any] = {"vocab_size": 320, "d_model": 16, "decoder_start_token_id": 0}
    T5Config(**sizes).save_pretrained(broken)
    refused(capfd, 5, "encoder-decoder", broken, data, *NEW)


def test_a_run_that_diverges_leaves_nothing(base: Path, data: Path, capfd: Any) -> None:
    refused(capfd, 1, "try a lower --lr", base, data, *NEW, "--lr", "1e38", "--steps", "5")
