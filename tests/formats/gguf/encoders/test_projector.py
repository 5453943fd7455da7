"""--mmproj: the encoders of images in a file of their own, by llama.cpp's converter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.errors import NotExpressible
from exporter.formats.gguf import writer
from exporter.formats.gguf.encoders.projector import plan_projector, projector_nbytes
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.gguf.raw_keys import raw_keys
from exporter.formats.gguf.writer import Key, TensorEntry
from exporter.formats.table import plan_target
from exporter.formats.target import FolderScratch
from exporter.io.parallel import Budget
from exporter.merge.plan import plan_merge
from exporter.progress import silent
from exporter.sources.gguf.file import GgufFile
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.verify.expect.reference import Reference
from exporter.verify.run import verify
from fixtures.zoo import build
from tests.conformance.gguf import required_converter
from tests.formats.gguf.converter.overlays import script_for_tiny_tokenizers

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SmolVLM with the settings of its processor, and with the text architecture that published models name."""
    base = build("smolvlm", tmp_path_factory.mktemp("seeing") / "lamp")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["architectures"] = ["LlamaForCausalLM"]
    (base / "config.json").write_text(json.dumps(config))
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"longest_edge": 32}}
    (base / "preprocessor_config.json").write_text(json.dumps(images))
    return base


def fake_converter(folder: Path, *architectures: str) -> Path:
    """A converter that supports the encoders of ``architectures`` and the text model Llama, and that cannot run."""
    (folder / "conversion").mkdir(parents=True)
    tables = {"TEXT_MODEL_MAP": ("LlamaForCausalLM",), "MMPROJ_MODEL_MAP": architectures}
    text = "".join(f"{name}: dict[str, str] = {dict.fromkeys(names, 'm')!r}\n" for name, names in tables.items())
    (folder / "conversion" / "__init__.py").write_text(text)
    (folder / "convert_hf_to_gguf.py").write_text("raise SystemExit(1)")
    return folder


def changed(
    path: Path, out: Path, key: Callable[[Key], Key | None] = lambda key: key, name: Callable[[str], str] = str
) -> Path:
    """Write a copy of a GGUF with other keys and other tensor names, and return the path of the copy."""
    file = GgufFile.open(path)
    keys = [new for old in raw_keys(file) if (new := key(old)) is not None]
    entries = [TensorEntry(name(tensor.name), tensor.type, tensor.shape) for tensor in file.tensors.values()]
    header = writer.header(keys, entries, alignment=file.alignment, version=file.version)[0]
    out.write_bytes(header + path.read_bytes()[file.data_offset :])
    return out


def test_a_plan_names_the_file_and_its_maker(seeing: Path, tmp_path: Path, capsys: Capture) -> None:
    converter = fake_converter(tmp_path / "converter", "SmolVLMForConditionalGeneration")
    argv = ["plan", str(seeing), "--to", "gguf", "--mmproj", "--converter", str(converter), "--quant", "Q4_K_M"]
    assert run([*argv, "-o", str(tmp_path / "out"), "--json"]) == 0
    model, encoders = json.loads(capsys.readouterr().out)["targets"]
    assert model["path"] == str(tmp_path / "out" / "gguf" / "lamp-Q4_K_M.gguf")
    assert encoders["path"] == str(tmp_path / "out" / "gguf" / "mmproj-lamp-F16.gguf")
    assert encoders["maker"] == "llama.cpp's converter"
    assert "encoders of images" in encoders["notes"][0]


def test_models_and_encoders_without_such_a_file_are_refused_with_the_reason(
    seeing: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    converter = fake_converter(tmp_path / "converter", "Other")
    for base, message in ((tiny_tied, "has none of vision_config"), (seeing, "not support the encoders of SmolVLMFor")):
        with pytest.raises(NotExpressible, match=message):
            plan_projector(plan_merge(Checkpoint.open(base), []), converter, "F16")
    argv = ["export", str(tiny_tied), "--to", "gguf", "--mmproj", "--converter", str(converter)]
    assert run([*argv, "-o", str(tmp_path / "out"), "-q"]) == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.converter
def test_the_converter_writes_encoders_that_pass_and_whose_faults_are_found(seeing: Path, tmp_path: Path) -> None:
    script = script_for_tiny_tokenizers(required_converter(), tmp_path / "converter")
    *_, options = GgufOptions(mmproj=True, converter=script).artifacts()
    merge = plan_merge(Checkpoint.open(seeing), [])
    target = plan_target(options, merge, Budget())
    path = tmp_path / "model.gguf"
    target.make(path, silent, FolderScratch(tmp_path))
    assert target.prefix == "mmproj-"
    size = path.stat().st_size
    assert 0.9 * size < target.nbytes == projector_nbytes(merge.model()) < 1.1 * size
    name = "clip.vision.projection_dim"
    damaged = {
        "encoders": changed(path, tmp_path / "a.gguf", lambda key: None if "has_vision" in key.name else key),
        "encoder sizes": changed(
            path, tmp_path / "b.gguf", lambda key: writer.u32(name, 65) if key.name == name else key
        ),
        "encoder tensors": changed(path, tmp_path / "c.gguf", name=lambda name: name.replace("v.blk.1.", "blk.1.")),
    }
    good, *bad = verify([path, *damaged.values()], Reference.open(seeing, []), level="full")
    assert good.passed, "the content tells that this file has encoders, not the name"
    assert {skip.name for skip in good.skipped} == {"weights", "logits"}
    assert [[check.name for check in report.failures] for report in bad] == [[name] for name in damaged]
