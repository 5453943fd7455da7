"""Failures of the converter are told as what the checkpoint lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import BadInput, MissingDependency, NotExpressible, OutputError
from exporter.formats.gguf.converter.faults import Failure, explained


def failure(*lines: str, returncode: int = 1) -> Failure:
    return Failure(Path("convert.py"), Path("base"), "ChatGLMModel", returncode, lines)


def traceback(function: str, statement: str, last: str) -> tuple[str, ...]:
    return (
        "INFO:hf-to-gguf:Set model tokenizer",
        "Traceback (most recent call last):",
        '  File "/c/convert_hf_to_gguf.py", line 9, in main',
        "    model_instance.write()",
        f'  File "/c/conversion/base.py", line 99, in {function}',
        f"    {statement}",
        "    ^^^^^^",
        last,
    )


@pytest.mark.parametrize(
    ("lines", "kind", "message"),
    [
        (
            traceback("_set_vocab_glm", "x = added['<|endoftext|>']", "KeyError: '<|endoftext|>'"),
            BadInput,
            r"^base: tokenizer: expected the token '<\|endoftext\|>', which .* for ChatGLMModel looks up, found a tok",
        ),
        (
            traceback("get_vocab_base", "assert max(tokenizer.vocab.values()) < vocab_size", "AssertionError"),
            BadInput,
            "^base: tokenizer: expected token ids below vocab_size of config.json, found a larger id",
        ),
        (
            traceback("_create_vocab_sentencepiece", "raise", "FileNotFoundError: File not found: /x/tokenizer.model"),
            BadInput,
            "^base: tokenizer: expected the file tokenizer.model, which .* reads, found none",
        ),
        (
            traceback("set_vocab", "assert len(parts) >= 3", "AssertionError"),
            BadInput,
            r"^base: tokenizer: expected a tokenizer that .* ends with AssertionError \(assert len\(parts\) >= 3\)$",
        ),
        (
            traceback("get_vocab_base_pre", "raise", "NotImplementedError: BPE pre-tokenizer was not recognized - x"),
            NotExpressible,
            "^gguf: base: tokenizer: expected a pre-tokenizer that this version of llama.cpp knows",
        ),
        (
            traceback("set_vocab", "raise", "FileNotFoundError: Cannot find Llama BPE tokenizer"),
            BadInput,
            "^base: tokenizer: expected a tokenizer that .* ends with FileNotFoundError: Cannot find Llama BPE tokeni",
        ),
        (
            traceback("set_gguf_parameters", "assert d_inner == 2 * d_model", "AssertionError"),
            BadInput,
            r"^base: config.json: expected d_inner == 2 \* d_model, as .* demands, found other values$",
        ),
        (
            traceback("set_gguf_parameters", "size = self.hparams['head_dim']", "KeyError: 'head_dim'"),
            BadInput,
            r"^base: config.json: expected the key 'head_dim', which .* for ChatGLMModel reads, found none$",
        ),
        (
            traceback("__init__", "assert self.opt_num_mtp_layers != 0", "AssertionError"),
            BadInput,
            r"^convert.py: exit status 1: AssertionError \(assert self.opt_num_mtp_layers != 0\)$",
        ),
        (
            traceback("map_tensor_name", "raise", "ValueError: Can not map tensor 'model.x'"),
            BadInput,
            r"^convert.py: exit status 1: ValueError: Can not map tensor 'model.x'$",
        ),
        (
            ("ERROR:hf-to-gguf:Model Other is not supported",),
            NotExpressible,
            "^gguf: base: llama.cpp's converter does not support the architecture Other; use --to hf",
        ),
        (
            traceback("<module>", "import tiktoken", "ModuleNotFoundError: No module named 'tiktoken'"),
            MissingDependency,
            "^llama.cpp's converter for ChatGLMModel needs tiktoken; run pip install 'tiktoken'",
        ),
        (("OSError: [Errno 28] No space left on device",), OutputError, "no space left on the device"),
    ],
)
def test_a_failure_is_explained(lines: tuple[str, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        raise explained(failure(*lines))


def test_a_process_that_was_killed_or_wrote_nothing_is_told() -> None:
    assert "convert.py: terminated by SIGKILL: no output" in str(explained(failure(returncode=-9)))
    assert "convert.py: the converter script wrote no GGUF file: done" in str(explained(failure("done", returncode=0)))
