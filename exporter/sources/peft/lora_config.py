"""Reads the LoRA settings that determine the weight update, and refuses settings that cannot be merged.

Source: ``LoraConfig`` and ``LoraLayer.scaling`` in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotExpressible, UnreadableFile

#: Setting → effect, for settings with an effect that no update of stored weights can represent.
_NOT_WEIGHTS: Final = {
    "alora_invocation_tokens": "switches the update on at certain tokens only",
    "arrow_config": "routes every token through updates of its own",
    "layer_replication": "adds layers to the model",
    "use_bdlora": "stores block-diagonal factors",
    "use_qalora": "pools the inputs of a quantised base",
    "kasa_config": "truncates the base's weights when it is loaded",
    "monteclora_config": "draws its factors at random",
    "megatron_config": "is made for Megatron's layers",
}
#: Initialisations that change the base's weights when the adapter is loaded. The LoRA factors belong to the changed
#: weights.
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PATTERN_SECONDS: Final = 0.5
#: Advice for adapters that ttexport cannot merge.
PEFT_MERGE: Final = "merge the adapter with PEFT's merge_and_unload() and export the resulting checkpoint"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Validated settings of a LoRA adapter.

    ranks, alphas: PEFT's rank_pattern and alpha_pattern, which map a module name or the end of a module name to a
    value.
    """

    path: Path
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool
    parameters: Sequence[str]

    @classmethod
    def read(cls, path: Path, config: Mapping[str, Any]) -> LoraSettings:
        """Validate the LoRA settings in ``config``, the parsed adapter_config.json at ``path``.

        Raises UnreadableFile, NotExpressible.
        """
        _refuse(path, config)
        ranks, alphas = (_table(path, config, key) for key in ("rank_pattern", "alpha_pattern"))
        if not all(value.is_integer() for value in ranks.values()):
            raise UnreadableFile(path, f"rank_pattern: expected integers, found {ranks!r:.80}")
        names = config.get("target_parameters") or []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise UnreadableFile(path, f"target_parameters: expected a list of names, found {names!r:.80}")
        return cls(
            path=path,
            rank=_whole(path, config, "r", 8),
            alpha=_number(path, config, "lora_alpha", 8),
            ranks={key: int(value) for key, value in ranks.items()},
            alphas=alphas,
            rslora=config.get("use_rslora") is True,
            fan_in_fan_out=config.get("fan_in_fan_out") is True,
            parameters=names,
        )

    def rank_of(self, module: str) -> int:
        """Return the rank of the update of ``module``, as given in the config."""
        return self.ranks.get(_pattern(self.path, self.ranks, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the scaling of the update of ``module``: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        alpha, rank = self.alphas.get(_pattern(self.path, self.alphas, module), self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _refuse(path: Path, config: Mapping[str, Any]) -> None:
    for key, effect in _NOT_WEIGHTS.items():
        if config.get(key):
            raise NotExpressible(
                f"{path}: {key}", f"the setting {effect}, which ttexport cannot merge", instead=PEFT_MERGE
            )
    method = config.get("init_lora_weights", True)
    if isinstance(method, str) and method.lower().startswith(_CHANGES_BASE):
        raise NotExpressible(
            f"{path}: init_lora_weights {method}",
            "this initialisation changes the weights of the base, and the factors belong to the changed weights",
            instead="save a plain LoRA adapter: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _pattern(path: Path, patterns: Mapping[str, object], module: str) -> str:
    """Return the first regular expression in ``patterns`` that matches the end of ``module``, else ``module``."""
    if not patterns:
        return module
    import regex  # unlike re, regex has a timeout, so that a hostile pattern cannot hang a release

    for pattern in patterns:
        try:
            if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATTERN_SECONDS):
                return pattern
        except (regex.error, TimeoutError) as exc:
            reason = "an expression that takes too long to match" if isinstance(exc, TimeoutError) else str(exc)
            raise UnreadableFile(path, f"{pattern!r:.80}: expected a regular expression, found {reason}") from exc
    return module


def _number(path: Path, config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UnreadableFile(path, f"{key}: expected a number above 0, found {value!r:.80}")
    return float(value)


def _whole(path: Path, config: Mapping[str, Any], key: str, default: int) -> int:
    value = _number(path, config, key, default)
    if not value.is_integer():
        raise UnreadableFile(path, f"{key}: expected a whole number, found {value!r:.80}")
    return int(value)


def _table(path: Path, config: Mapping[str, Any], key: str) -> dict[str, float]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise UnreadableFile(path, f"{key}: expected a table, found {table!r:.80}")
    return {pattern: _number(path, table, pattern, 0) for pattern in table}
