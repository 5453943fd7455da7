"""Shared by the matrix tests: bases, adapters and reference logits, built once per session, and an end-to-end merge."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from exporter.formats.hf.write import plan_hf, write_hf
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from exporter.verify.expect.reference import Reference
from exporter.verify.run import verify
from exporter.verify.runtimes.reference import attach
from exporter.verify.tolerances import HF_MAX_ABS
from fixtures.hostile import rawtensors
from fixtures.models.tie_layouts import VOCAB, build
from fixtures.peft_adapters import IDS, NEW_IDS, OTHER_IDS, RECIPES, build_adapter

#: Both sides use the same kernels in fp32: only the order of additions differs, by up to 4e-6 on logits of up to 10.
LOGITS_MAX_ABS: Final = HF_MAX_ABS
_SEQUENCE: Final = (3, 17, 2, 9, 5, 30, 11, 8, 17, 36)
_VOCABULARY: Final = ("embed_tokens", "wte", "shared", "lm_head")
#: Segments of keys and stored names that do not distinguish modules.
_WRAPPERS: Final = frozenset({"base_model", "model", "language_model", "transformer", "base_layer", "token_adapter"})
_NOT_A_MODULE: Final = ("lora_", "trainable_tokens_", "modules_to_save", "weight", "bias")

#: dtype, shape, bytes
Stored = tuple[str, tuple[int, ...], bytes]


class Bench:
    """Bases by family and layout; adapters and reference logits also by adapter kind. Folders are read-only."""

    def __init__(self, folder: Path) -> None:
        """``folder``: where everything is built."""
        self._folder = folder
        self._models: dict[tuple[str, str], Any] = {}
        self._logits: dict[tuple[str, str, str], torch.Tensor] = {}

    def base(self, family: str, layout: str, dtype: str = "float32") -> Path:
        """The checkpoint."""
        path = self._folder / f"{family}-{layout}-{dtype}"
        return path if path.exists() else build(path, family, layout, dtype=dtype)

    def model(self, family: str, layout: str) -> Any:
        """A copy of the base in memory; layouts that differ only on disk share one."""
        layout = "tied" if layout in ("duplicate", "copies") else layout
        if (family, layout) not in self._models:
            self._models[family, layout] = reloaded(self.base(family, layout), family)
        return copy.deepcopy(self._models[family, layout])

    def adapter(self, family: str, layout: str, kind: str) -> Path:
        """The adapter, created on the base in memory."""
        layout = "tied" if layout in ("duplicate", "copies") else layout
        path = self._folder / f"{family}-{layout}-{kind}".replace(" ", "_")
        return path if path.exists() else build_adapter(self.model(family, layout), path, family, RECIPES[kind])

    def unmerged(self, family: str, layout: str, kind: str) -> torch.Tensor:
        """Logits of the model with the adapter on it."""
        key = (family, "tied" if layout in ("duplicate", "copies") else layout, kind)
        if key not in self._logits:
            tuned = self.tuned(family, layout, [self.adapter(*key)], grown=RECIPES[kind].grows)
            self._logits[key] = logits(tuned, grown=RECIPES[kind].grows)
        return self._logits[key]

    def tuned(self, family: str, layout: str, adapters: Sequence[Path], *, grown: bool = False) -> Any:
        """The model with adapters on it, unmerged."""
        model = self.model(family, layout)
        if grown:
            torch.manual_seed(99)  # the adapter has to set the new rows, whatever their initial values
            model.resize_token_embeddings(VOCAB + len(NEW_IDS), mean_resizing=False)
        return attached(model, adapters)


def logits(model: Any, *, grown: bool = False) -> torch.Tensor:
    """(1, positions, vocabulary) for a sequence with trained and other tokens."""
    ids = torch.tensor([[*_SEQUENCE, *(NEW_IDS if grown else ())]])
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, **both).logits
    return result


def attached(model: Any, adapters: Sequence[Path]) -> Any:
    """``model`` with adapters on it, unmerged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of ties and of older files
        return attach(model, [str(path) for path in adapters]).eval()


def difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The largest absolute difference."""
    return (logits - others).abs().max().item()


def reloaded(path: Path, family: str = "") -> Any:
    """The checkpoint loaded by plain transformers, which must use every tensor and initialise none."""
    auto: Any = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def merge(base: Path, adapters: Sequence[Path], out: Path, *, untie: bool = False, dtype: str | None = None) -> Path:
    """A merged checkpoint, written to ``out``."""
    plan = plan_merge(Checkpoint.open(base), [Adapter.open(path) for path in adapters], untie=untie)
    write_hf(plan_hf(plan.model(dtype)), out)
    return out


def require_verified(out: Path, base: Path, adapters: Sequence[Path], *, untie: bool = False) -> None:
    """Verification at level rows must pass."""
    (report,) = verify([out], Reference.open(base, adapters, untie=untie), level="rows")
    assert report.passed, [check for check in report.checks if not check.passed]


def stored(folder: Path, name: str = "model.safetensors") -> dict[str, Stored]:
    """The tensors of a file by name."""
    header, data = rawtensors.read(folder / name)
    return {
        tensor: (header[tensor]["dtype"], tuple(header[tensor]["shape"]), data[slice(*header[tensor]["data_offsets"])])
        for tensor in rawtensors.tensors(header)
    }


def values(tensor: Stored) -> torch.Tensor:
    """The numbers of a stored float tensor."""
    dtype, shape, raw = tensor
    return torch.frombuffer(bytearray(raw), dtype={"F32": torch.float32, "BF16": torch.bfloat16}[dtype]).reshape(shape)


def require_untouched(out: Path, base: Path, adapter: Path) -> None:
    """Modules without a tensor in the adapter, and rows that it does not train, must equal the base byte for byte."""
    keys = list(stored(adapter, "adapter_model.safetensors"))
    before, after = stored(base), stored(out)
    touched = {_path(key) for key in keys}
    vocabulary = [key for key in keys if _path(key)[-1] in _VOCABULARY]
    only_rows = all(key.endswith("trainable_tokens_delta") for key in vocabulary)
    for name, tensor in before.items():
        if _path(name)[-1] not in _VOCABULARY:
            assert _path(name) in touched or after[name] == tensor, f"{name} was not trained"
        elif only_rows and name in after:
            assert set(_changed_rows(tensor, after[name])) <= {*IDS, *OTHER_IDS}, f"{name}: other rows were not trained"


def _path(key: str) -> tuple[str, ...]:
    return tuple(name for name in key.split(".") if name not in _WRAPPERS and not name.startswith(_NOT_A_MODULE))


def _changed_rows(base: Stored, merged: Stored) -> Iterator[int]:
    (_, (rows, *_), before), (*_, after) = base, merged
    width = len(before) // rows
    return (row for row in range(rows) if before[row * width :][:width] != after[row * width :][:width])
