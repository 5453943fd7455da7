"""Compute llama.cpp's logits of a GGUF, in a process of its own, because llama.cpp may abort its process.

    python -m benchmarks.census.llama_logits GGUF PROMPTS.json LOGITS.npy

PROMPTS.json has the token ids of prompts of equal length; LOGITS.npy gets an array (prompts, length, vocabulary).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def main(arguments: Sequence[str]) -> None:
    os.environ["GGML_NO_BACKTRACE"] = "1"
    from exporter.verify.runtimes.llamacpp import Session, silence

    gguf, prompts, logits = arguments
    ids: list[list[int]] = json.loads(Path(prompts).read_text())
    with silence():
        session = Session(gguf, max(map(len, ids)) + 8)
        np.save(logits, np.stack([session.logits(each) for each in ids]))


if __name__ == "__main__":
    main(sys.argv[1:])
