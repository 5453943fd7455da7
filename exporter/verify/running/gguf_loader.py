"""transformers' own GGUF loader, beside llama.cpp: the same file has to compute the same where others read it.

It dequantises a file and computes in float32. That takes it many times as long as llama.cpp, most of it for the
vocabulary, so that it runs a few sequences of one file unless it is required.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from exporter.errors import NotExpressible
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check
from exporter.verify.running.logits import Reader
from exporter.verify.running.metrics import Distance, compare, pool
from exporter.verify.tolerances import HF_ROUNDING_SHARE, LOADER_KL, LOADER_MAX_ABS

#: What ``--require`` calls it, and skips and checks as well.
NAME: Final = "transformers-gguf"
#: What it computes as the checkpoint does, if rotations are not scaled. Measured in float32 with transformers 5.23:
#: these are equal; of the others it refuses most, and computes some wrongly (KL up to 1.2).
_COMPUTED: Final = ("llama", "qwen2", "phi3", "stablelm")
#: Settings of StableLM's that it does not read from a file: logits are off by 3.4 on a tiny model.
_NOT_READ: Final = ("qk_layernorm", "use_parallel_residual")


def unable(reference: Reference) -> str | None:
    """Why it does not do for the model; None if it does."""
    config = reference.checkpoint.text_config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    model, rotation = config.get("model_type"), rope.get("rope_type", rope.get("type", "default"))
    if other := next((name for name in _NOT_READ if config.get(name)), None):
        return f"transformers' own loader does not do for {model}, {other}"
    if model in _COMPUTED and rotation == "default":
        return None
    return f"transformers' own loader does not do for {model}, rotation {rotation}"


def require_able(reference: Reference) -> None:
    """Raise NotExpressible for a model that it does not compute."""
    if reason := unable(reference):
        raise NotExpressible(f"--require {NAME}", reason, instead="llama.cpp runs the file")


def shown(sequences: Sequence[Sequence[int]], trained: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of the sequences that it runs: the first, and the first with trained tokens."""
    return [0] if not trained else [0, len(sequences) - len(trained)]


def distance(want: Reader, name: str, got: Reader, numbers: Sequence[int]) -> Distance:
    """Of its logits from ``want``'s of the sequences ``numbers``."""
    return pool([compare(want(f"{name}.{number}"), got(f"full.{place}")) for place, number in enumerate(numbers)])


def check_exact(found: Distance, rounding: float) -> Check:
    """A file of floats is the rounded reference, in the same kernels.  rounding: its max abs, where sums are stored."""
    limit = max(LOADER_MAX_ABS, HF_ROUNDING_SHARE * rounding)
    return Check.at_most(NAME, found.max_abs, limit, f"max abs over {found.positions} positions")


def check_quantised(found: Distance) -> Check:
    """A quantised one computes what llama.cpp makes of it, which also rounds activations."""
    detail = f"mean KL from llama.cpp over {found.positions} positions, max abs {found.max_abs:.2g}"
    return Check.at_most(NAME, found.kl, LOADER_KL, detail)
