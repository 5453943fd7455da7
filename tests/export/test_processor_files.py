"""Files of a processor of images: transformers loads the processor from the written folder as from base and adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from exporter.cli.main import run

CHAT = [{"role": "user", "content": "<b>yes</b>"}]
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


def processor(folder: Path, width: int, *, old: bool) -> Path:
    """Store a processor as transformers 5 does, or in the files of transformers 4. width: of the images, in pixels."""
    size = {"height": width, "width": width}
    # The name of the class that needs no torchvision depends on the version of transformers.
    images = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(crop_size=size, size=size)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made: Any = transformers.LlavaProcessor(images, tokenizer, patch_size=4, chat_template=TEMPLATE + str(width))
    made.save_pretrained(folder)
    if old:
        settings = json.loads((folder / "processor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
        (folder / "processor_config.json").write_text(json.dumps(settings))
        text = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    return folder


def facts(folder: Path) -> tuple[str, list[int], float]:
    """Return (chat as rendered, shape of the pixels, sum of the pixels) of the processor in ``folder``."""
    made: Any = transformers.LlavaProcessor.from_pretrained(folder)
    picture = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    pixels = np.asarray(made.image_processor(picture, return_tensors="np")["pixel_values"])
    return made.apply_chat_template(CHAT, tokenize=False), list(pixels.shape), float(pixels.sum())


@pytest.fixture
def base(tiny_tied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_tied, tmp_path / "base"))


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


def merge(base: Path, adapter: Path, out: Path, *more: str) -> int:
    argv = ["merge", str(adapter), "--base", str(base), "--to", "hf", "-o", str(out), "--verify", "rows", "-q"]
    return run([*argv, *more])


@pytest.mark.parametrize("old", [True, False])
def test_the_bases_processor_is_kept(base: Path, adapter: Path, tmp_path: Path, *, old: bool) -> None:
    processor(base, 8, old=old)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (adapter / name).unlink()
    (base / "qformer_tokenizer").mkdir()
    (base / "qformer_tokenizer" / "vocab.txt").write_text("a")
    (base / "video_preprocessor_config.json").write_text("{}")
    (base / "processing_custom.py").write_text("x")
    assert merge(base, adapter, tmp_path / "out") == 0
    assert facts(tmp_path / "out") == facts(base)
    assert facts(base)[1] == [1, 3, 8, 8]
    assert (tmp_path / "out" / "qformer_tokenizer" / "vocab.txt").read_text() == "a"
    assert (tmp_path / "out" / "video_preprocessor_config.json").exists()
    assert not (tmp_path / "out" / "processing_custom.py").exists(), "a program is never copied"


@pytest.mark.parametrize("old", [True, False])
def test_the_adapters_processor_wins(base: Path, adapter: Path, tmp_path: Path, *, old: bool) -> None:
    processor(base, 8, old=True)
    processor(adapter, 4, old=old)
    assert merge(base, adapter, tmp_path / "out") == 0
    assert facts(tmp_path / "out") == facts(adapter)
    assert facts(adapter)[1] == [1, 3, 4, 4]


def test_an_onnx_folder_has_the_processor(base: Path, adapter: Path, tmp_path: Path) -> None:
    processor(base, 8, old=True)
    (adapter / "chat_template.jinja").unlink()
    assert merge(base, adapter, tmp_path / "out", "--to", "onnx") == 0
    assert facts(tmp_path / "out" / "onnx") == facts(base)


def test_a_changed_or_missing_file_of_the_processor_is_found(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor(base, 8, old=False)
    out = tmp_path / "out"
    assert merge(base, adapter, out) == 0
    argv = ["verify", str(out), "--reference", str(base), "--adapter", str(adapter), "--level", "rows"]
    assert run(argv) == 0
    settings = json.loads((out / "processor_config.json").read_text())
    settings["image_processor"]["rescale_factor"] = 1
    (out / "processor_config.json").write_text(json.dumps(settings))
    assert run(argv) == 3
    assert "processor_config.json: expected the content of the tuned model's file" in capsys.readouterr().err
    (out / "processor_config.json").unlink()
    assert run(argv) == 3
    assert "processor_config.json: expected this file in the model's folder" in capsys.readouterr().err
