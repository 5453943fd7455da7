"""Usage lines of a model card: for each client, how to run the artifact that it reads; none for what is not there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from exporter.release.documents import modelfile
from exporter.release.documents.manifest import ArtifactEntry, Manifest

#: Files → the options by which transformers.js finds them, the preferred one first. Source: its
#: DEFAULT_DTYPE_SUFFIX_MAPPING, which says how the name of a file ends; model_file_name is what stands before that.
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
_ASK: Final = "Hello!"


@dataclass(frozen=True, slots=True)
class Usage:
    """A block of code; ``language`` as Markdown wants it."""

    client: str
    language: str
    code: str


def usages(manifest: Manifest, model: str) -> list[Usage]:
    """What can be run, written for the folder of ``model`` as working directory."""
    return [*_gguf(manifest, model), *_transformers(manifest, model), *_onnx(manifest, model)]


def below(manifest: Manifest, model: str, path: str) -> str:
    """``path`` of the release as seen from the folder of ``model``."""
    folder = manifest.models[model].folder
    return path.removeprefix(f"{folder}/") if folder else path


def held(manifest: Manifest, artifact: ArtifactEntry) -> list[str]:
    """Paths of the artifact's files, sorted: one, the parts of one, or those of a folder."""
    path, inside = modelfile.PART.sub("", artifact.path), f"{artifact.path}/"
    paths = [entry.path for entry in manifest.files]
    return [one for one in paths if one.startswith(inside) or modelfile.PART.sub("", one) == path]


def _gguf(manifest: Manifest, model: str) -> Iterator[Usage]:
    files = modelfile.ranked_files(manifest, model)
    if files:
        path = below(manifest, model, files[0].path)
        yield Usage("llama.cpp", "sh", f"llama-cli -m {shlex.quote(path)} -p '{_ASK}'")
    if any(not modelfile.PART.search(one.path) for one in files):
        name = _slug(manifest.models[model].name)
        yield Usage("Ollama", "sh", f"ollama create {name} -f {modelfile.NAME}\nollama run {name} '{_ASK}'")


def _transformers(manifest: Manifest, model: str) -> Iterator[Usage]:
    for artifact in _of(manifest, model, "hf")[:1]:
        path = below(manifest, model, artifact.path)
        yield Usage(
            "transformers",
            "python",
            "from transformers import pipeline\n\n"
            f'generate = pipeline("text-generation", {json.dumps(f"./{path}")})\n'
            f'print(generate("{_ASK}", max_new_tokens=64))',
        )


def _onnx(manifest: Manifest, model: str) -> Iterator[Usage]:
    for artifact in _of(manifest, model, "onnx")[:1]:
        files, path = held(manifest, artifact), below(manifest, model, artifact.path)
        if f"{artifact.path}/genai_config.json" in files:
            yield Usage("onnxruntime-genai", "python", _genai(path))
        stems = {PurePosixPath(file).stem for file in files if file.endswith(".onnx") and "/onnx/" in file}
        choice = next((choice for stem, choice in _CHOICES_BY_STEM.items() if stem in stems), None)
        if choice:
            yield Usage("transformers.js", "js", _transformers_js(path, choice))


def _genai(path: str) -> str:
    return (
        "import onnxruntime_genai as og\n\n"
        f"model = og.Model({json.dumps(f'./{path}')})\n"
        "tokenizer = og.Tokenizer(model)\n"
        "parameters = og.GeneratorParams(model)\n"
        "parameters.set_search_options(max_length=128)\n"
        "generator = og.Generator(model, parameters)\n"
        f'generator.append_tokens(tokenizer.encode("{_ASK}"))\n'
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
        f'console.log(await generate("{_ASK}", {{ max_new_tokens: 64 }}));'
    )


def _of(manifest: Manifest, model: str, fmt: str) -> Sequence[ArtifactEntry]:
    return [one for one in manifest.artifacts if one.model == model and one.format == fmt]


def _slug(name: str) -> str:
    """A name that Ollama takes: lower case letters, digits, and ``-_.`` between them."""
    word = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in name)
    return word.strip("-_.").lower() or "model"
