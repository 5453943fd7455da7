"""llama.cpp's own converter as the judge of GGUF files.

Its source lies in the source distribution of llama-cpp-python, under vendor/llama.cpp:

    pip download --no-binary :all: --no-deps llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    TTEXPORT_LLAMA_CPP=…/vendor/llama.cpp python -m tests.conformance.gguf      # makes the golden digests anew
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from exporter.sources.gguf import GgufFile
from exporter.sources.gguf_header import GgufArray
from tests.formats.gguf.models import CASES
from tests.formats.gguf.vocabularies import VOCABULARIES

GOLDEN = Path(__file__).parents[1] / "formats" / "gguf" / "golden.json"
GOLDEN_VOCABULARIES = GOLDEN.with_name("golden_vocabularies.json")
VARIABLE = "TTEXPORT_LLAMA_CPP"

#: Free text about the model; our provenance.
_OURS = ("general.name", "general.basename", "general.finetune", "general.version", "general.description")

# The converter hashes the ids of a text to find the name of the splitting, which no tiny tokenizer can match.
_RUN = """
import sys
root, pre_tokenizer = sys.argv[1:3]
sys.path[:0] = [root, root + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
convert_hf_to_gguf.main()
"""


def converter() -> Path | None:
    """The unpacked llama.cpp, if the environment names one."""
    root = os.environ.get(VARIABLE)
    return Path(root) if root else None


def convert(root: Path, source: Path, out: Path, ftype: str, pre_tokenizer: str, *options: str) -> None:
    """Run the converter in ``root`` on a checkpoint. Raises RuntimeError with its last words."""
    command = [sys.executable, "-c", _RUN, str(root), pre_tokenizer, str(source)]
    command += ["--outfile", str(out), "--outtype", ftype.lower(), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def digest(path: Path) -> dict[str, Any]:
    """Keys with their values (arrays as digests) and tensors in order: name, type, shape, digest of the bytes."""
    file = GgufFile.open(path)
    keys = {}
    for name, value in file.metadata.items():
        if name not in _OURS and not name.startswith("ttexport."):
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
    """Run the converter on the tokenizer and config of a checkpoint alone. Raises RuntimeError with its last words."""
    convert(root, source, out, "f32", "default", "--vocab-only")


def _array(value: GgufArray) -> str:
    text = json.dumps(value.values(), ensure_ascii=True)
    return f"{value.count} of type {value.kind}: {hashlib.sha256(text.encode()).hexdigest()}"


def main() -> None:
    """Write the golden digests."""
    root = converter()
    if root is None:
        sys.exit(f"set {VARIABLE} to llama.cpp's folder")
    names = {"tied": "smollm", "untied": "smollm", "llama3": "llama-bpe", "linear": "gpt-2", "added": "qwen2"}
    golden: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case, (build, ftypes) in CASES.items():
            source = build(Path(folder) / case)
            for ftype in ftypes:
                out = Path(folder) / f"{case}.{ftype}.gguf"
                convert(root, source, out, ftype, names[case])
                golden[f"{case}-{ftype}"] = digest(out)
        vocabularies: dict[str, Any] = {}
        for case, build_folder in VOCABULARIES.items():
            out = Path(folder) / f"{case}.gguf"
            convert_vocabulary(root, build_folder(Path(folder) / f"vocabulary-{case}"), out)
            vocabularies[case] = tokenizer_keys(out)
    GOLDEN_VOCABULARIES.write_text(json.dumps(vocabularies, indent=1) + "\n", encoding="utf-8")
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
