"""Usage examples for model cards: code that runs a format's artifacts, for each client that supports the format."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from exporter.sources.gguf.split_files import split_file_stem

#: Name of the file that ``ollama create`` reads.
MODELFILE: Final = "Modelfile"
#: File types in the order in which a model card recommends GGUF files: the smallest file type with almost no loss
#: first, then file types of similar size.
_PREFERRED: Final = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "F16", "BF16", "F32")
#: Model files → the options by which transformers.js finds the files, preferred files first. Source: transformers.js'
#: DEFAULT_DTYPE_SUFFIX_MAPPING, a table of dtype → end of the file name. model_file_name is the rest of the file name.
_CHOICES_BY_STEM: Final = {
    "model_q4": 'dtype: "q4"',
    "model_q4f16": 'dtype: "q4f16"',
    "model_sym_q4": 'model_file_name: "model_sym", dtype: "q4"',
    "model_sym_q4f16": 'model_file_name: "model_sym", dtype: "q4f16"',
    "model_quantized": 'dtype: "q8"',
    "model_int8": 'dtype: "int8"',
    "model_fp16": 'dtype: "fp16"',
    "model": 'dtype: "fp32"',
}
_PROMPT: Final = "Hello!"


@dataclass(frozen=True, slots=True)
class ReleasedArtifact:
    """An artifact of a release, as described by the model card in the folder of the release.

    path: the path of the artifact's file or folder, or of the first part of a split GGUF. files: the sorted paths of
    all files of the artifact. All paths are relative to the model card's folder, with forward slashes.
    """

    path: str
    storage: str
    files: Sequence[str]

    @property
    def is_split(self) -> bool:
        """Whether the artifact is a split GGUF."""
        return split_file_stem(self.path) is not None


@dataclass(frozen=True, slots=True)
class Usage:
    """A code block of a model card. language: the language tag of the Markdown code block, such as "python"."""

    client: str
    language: str
    code: str


#: A function that makes the code blocks for all artifacts of a format. The second argument is the model's name.
UsageOf = Callable[[Sequence[ReleasedArtifact], str], Iterator[Usage]]


def preferred_gguf(artifacts: Sequence[ReleasedArtifact]) -> list[ReleasedArtifact]:
    """Sort GGUF ``artifacts`` by file type, with the most recommended file type first."""

    def rank(artifact: ReleasedArtifact) -> tuple[int, str]:
        storage = artifact.storage.upper()
        return _PREFERRED.index(storage) if storage in _PREFERRED else len(_PREFERRED), artifact.path

    return sorted(artifacts, key=rank)


def checkpoint_usage(artifacts: Sequence[ReleasedArtifact], name: str) -> Iterator[Usage]:
    """Yield the code for running a Hugging Face checkpoint with a transformers pipeline."""
    yield Usage(
        "transformers",
        "python",
        "from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", {json.dumps(f"./{artifacts[0].path}")})\n'
        f'print(generate("{_PROMPT}", max_new_tokens=64))',
    )


def gguf_usage(artifacts: Sequence[ReleasedArtifact], name: str) -> Iterator[Usage]:
    """Yield the code for running a GGUF with llama.cpp and, if a GGUF is not split, with Ollama.

    The code for llama.cpp uses the GGUF with the most recommended file type. The code for Ollama uses the Modelfile.
    """
    preferred = preferred_gguf(artifacts)[0]
    yield Usage("llama.cpp", "sh", f"llama-cli -m {shlex.quote(preferred.path)} -p '{_PROMPT}'")
    if not all(artifact.is_split for artifact in artifacts):
        model = _ollama_name(name)
        yield Usage("Ollama", "sh", f"ollama create {model} -f {MODELFILE}\nollama run {model} '{_PROMPT}'")


def gguf_lora_usage(artifacts: Sequence[ReleasedArtifact], name: str) -> Iterator[Usage]:
    """Yield the code for running a GGUF LoRA with llama.cpp, on top of a GGUF of the base model."""
    path = shlex.quote(artifacts[0].path)
    comment = "# BASE.gguf: the base model without the adapter"
    yield Usage("llama.cpp with LoRA", "sh", f"{comment}\nllama-cli -m BASE.gguf --lora {path} -p '{_PROMPT}'")


def onnx_usage(artifacts: Sequence[ReleasedArtifact], name: str) -> Iterator[Usage]:
    """Yield the code for running an ONNX folder with onnxruntime-genai and transformers.js.

    A client is left out if the ONNX folder does not contain the files that the client needs.
    """
    folder = artifacts[0]
    if f"{folder.path}/genai_config.json" in folder.files:
        yield Usage("onnxruntime-genai", "python", _genai(folder.path))
    stems = {PurePosixPath(file).stem for file in folder.files if file.endswith(".onnx") and "/onnx/" in file}
    choice = next((choice for stem, choice in _CHOICES_BY_STEM.items() if stem in stems), None)
    if choice:
        yield Usage("transformers.js", "js", _transformers_js(folder.path, choice))


def _genai(path: str) -> str:
    return (
        "import onnxruntime_genai as og\n\n"
        f"model = og.Model({json.dumps(f'./{path}')})\n"
        "tokenizer = og.Tokenizer(model)\n"
        "parameters = og.GeneratorParams(model)\n"
        "parameters.set_search_options(max_length=128)\n"
        "generator = og.Generator(model, parameters)\n"
        f'generator.append_tokens(tokenizer.encode("{_PROMPT}"))\n'
        "while not generator.is_done():\n"
        "    generator.generate_next_token()\n"
        "print(tokenizer.decode(generator.get_sequence(0)))"
    )


def _transformers_js(path: str, choice: str) -> str:
    return (
        'import { env, pipeline } from "@huggingface/transformers";\n\n'
        'env.localModelPath = "./";\n'
        "env.allowRemoteModels = false;\n"
        f'const generate = await pipeline("text-generation", {json.dumps(path)}, {{ {choice} }});\n'
        f'console.log(await generate("{_PROMPT}", {{ max_new_tokens: 64 }}));'
    )


def _ollama_name(name: str) -> str:
    """Turn ``name`` into a valid Ollama model name: lower case letters and digits, separated by ``-_.``."""
    letters = [letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in name]
    return "".join(letters).strip("-_.").lower() or "model"
