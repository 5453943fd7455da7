"""Make usage examples for model cards of ONNX folders. Each example runs onnxruntime-genai or transformers.js."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Final

from exporter.formats.usage import PROMPT, ReleasedArtifact, Usage

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


def onnx_usage(artifacts: Sequence[ReleasedArtifact], name: str) -> Iterator[Usage]:
    """Yield example code that runs an ONNX folder with onnxruntime-genai and with transformers.js.

    If the ONNX folder lacks a file that onnxruntime-genai or transformers.js needs, the example for the client is left
    out.
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
        f'generator.append_tokens(tokenizer.encode("{PROMPT}"))\n'
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
        f'console.log(await generate("{PROMPT}", {{ max_new_tokens: 64 }}));'
    )
