"""Reads the LoRA settings that determine the weight update, and raises an error for settings that cannot be merged.

Source: ``LoraConfig`` and ``LoraLayer.scaling`` in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotExpressible, UnreadableFile
from exporter.sources.peft.matching import first_pattern, targets
from exporter.sources.peft.types.table import REPEATABLE_INITS, VIA_PEFT

#: Setting → effect, for settings with an effect that no update of stored weights can represent.
_NOT_WEIGHTS: Final = {
    "alora_invocation_tokens": "the setting applies the update only at certain tokens",
    "arrow_config": "the setting routes each token through separate updates",
    "layer_replication": "the setting adds layers to the model",
    "use_bdlora": "the setting stores block-diagonal factors",
    "use_qalora": "the setting pools the layer inputs of a quantised base",
    "kasa_config": "the setting truncates the weights of the base when the adapter is loaded",
    "monteclora_config": "the setting draws the LoRA factors at random",
    "megatron_config": "the setting applies only to Megatron layers",
}
#: Initialisations that change the base's weights when the adapter is loaded. The LoRA factors belong to the changed
#: weights.
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Advice for adapters that ttexport cannot merge.
PEFT_MERGE: Final = "merge the adapter with PEFT's merge_and_unload() and export the resulting checkpoint"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Validated settings of a LoRA adapter.

    ranks, alphas: PEFT's rank_pattern and alpha_pattern. The keys of rank_pattern and alpha_pattern are regular
    expressions for the last segments of a module's path, and the values are the ranks and alphas of the matching
    modules. target_modules: the names of the modules to which LoRA is applied, or a regular expression that matches
    them. parameters: PEFT's target_parameters, the names of single parameters to which LoRA is applied. A name in
    target_parameters may begin with segments of the module's path.
    """

    path: Path
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool
    target_modules: str | Sequence[str]
    parameters: Sequence[str]

    @classmethod
    def read(cls, path: Path, config: Mapping[str, Any], *, via_peft: bool = False) -> LoraSettings:
        """Validate the LoRA settings in ``config``, the parsed adapter_config.json at ``path``.

        via_peft: whether PEFT computes the merge. Only PEFT can merge an adapter whose initialisation changes the base.
        Raises UnreadableFile for an invalid setting, and NotExpressible for a setting that cannot be merged.
        """
        _refuse(path, config, via_peft=via_peft)
        ranks, alphas = (_table(path, config, key) for key in ("rank_pattern", "alpha_pattern"))
        if not all(value.is_integer() for value in ranks.values()):
            raise UnreadableFile(path, f"rank_pattern: expected integers, found {ranks!r:.80}")
        modules = config.get("target_modules")
        return cls(
            path=path,
            rank=_whole(path, config, "r", 8),
            alpha=_number(path, config, "lora_alpha", 8),
            ranks={key: int(value) for key, value in ranks.items()},
            alphas=alphas,
            rslora=config.get("use_rslora") is True,
            fan_in_fan_out=config.get("fan_in_fan_out") is True,
            target_modules=modules if isinstance(modules, str) else _names(path, config, "target_modules"),
            parameters=_names(path, config, "target_parameters"),
        )

    def rank_of(self, name: str) -> int:
        """Return the rank that the adapter's config specifies for a low-rank update.

        For a stack of experts, the rank of the update of a single expert is returned. name: path of the updated module
        or, for a parameter in target_parameters, path of the parameter. Source: ``LoraModel._create_and_replace`` in
        PEFT, which matches rank_pattern against the path of the parameter.
        """
        pattern = first_pattern(self.path, self.ranks, name)
        return self.rank if pattern is None else self.ranks[pattern]

    def scaling_of(self, name: str) -> float:
        """Return the scaling of an update: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA.

        name: path of the updated module or parameter, as for ``rank_of``. For a stack of experts, alpha is divided by
        the rank of a single expert's update. Source: ``ParamWrapper.update_layer`` in PEFT.
        """
        pattern = first_pattern(self.path, self.alphas, name)
        alpha, rank = self.alpha if pattern is None else self.alphas[pattern], self.rank_of(name)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def parameters_of(self, module: str, count: int) -> list[str]:
        """Return the names of the parameters of ``module`` that the config lists in target_parameters.

        count: number of updates of the module in the adapter file. An entry of target_parameters matches the last
        segments of a parameter's path. An entry without a module name, such as ``down_proj``, matches every module that
        has the parameter. An entry without a module name is used only if the entries with a module name match fewer
        than ``count`` parameters. For a module in target_modules, no parameters are returned, because PEFT does not
        apply LoRA to both a module and its single parameters. Source: ``BaseTuner._inject_parameters``.
        """
        if not self.parameters or targets(self.path, self.target_modules, module):
            return []
        split = [name.rpartition(".")[::2] for name in self.parameters]
        named = {name: None for owner, name in split if owner and f".{module}".endswith(f".{owner}")}
        if len(named) < count:
            named |= {name: None for owner, name in split if not owner}
        return list(named)


def _refuse(path: Path, config: Mapping[str, Any], *, via_peft: bool) -> None:
    for key, effect in _NOT_WEIGHTS.items():
        if config.get(key):
            raise NotExpressible(f"{path}: {key}", f"{effect}, which ttexport cannot merge", instead=PEFT_MERGE)
    method = config.get("init_lora_weights", True)
    repeatable = method in REPEATABLE_INITS
    if repeatable and via_peft and config.get("target_parameters"):
        reason = f"{method} initialises the factors of target_parameters differently from the factors of target_modules"
        raise NotExpressible(f"{path}: target_parameters", reason, instead=PEFT_MERGE)
    if isinstance(method, str) and method.lower().startswith(_CHANGES_BASE) and not (repeatable and via_peft):
        raise NotExpressible(
            f"{path}: init_lora_weights {method}",
            "this initialisation changes the weights of the base, and the factors apply only to the changed weights",
            instead="save a plain LoRA adapter with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            + (f", or {VIA_PEFT}" if repeatable else ""),
        )


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
        raise UnreadableFile(path, f"{key}: expected a JSON object, found {table!r:.80}")
    return {pattern: _number(path, table, pattern, 0) for pattern in table}


def _names(path: Path, config: Mapping[str, Any], key: str) -> list[str]:
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UnreadableFile(path, f"{key}: expected a list of names, found {names!r:.80}")
    return names
