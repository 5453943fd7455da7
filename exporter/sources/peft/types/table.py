"""Lists the adapter types that only PEFT can merge, and the reasons why other adapter types cannot be merged.

A type is in ``MERGED`` if its effect is linear in the input of each module, if PEFT's merge of a single module equals
PEFT's forward pass without a merge, and if a test of ttexport merges an adapter of the type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotExpressible

#: Advice for adapters that PEFT can merge.
VIA_PEFT: Final = "let PEFT merge the adapter, with ttexport merge --via peft or with PEFT's merge_and_unload()"
#: Initialisations of LoRA that change the base's weights when the adapter is loaded, and that depend on these weights
#: alone. PEFT repeats such an initialisation exactly. Source: ``LoraLayer.update_layer`` in PEFT.
REPEATABLE_INITS: Final = ("pissa", "olora")


@dataclass(frozen=True, slots=True)
class MergedType:
    """A type of adapter that PEFT merges.

    title: the name of the type in messages. prefix: the first characters that follow the module's path in a tensor's
    name. shared: whether adapters of the type contain tensors that all modules share and that depend on the shapes of
    all modules.
    """

    title: str
    prefix: str
    shared: bool = False


MERGED: Final[Mapping[str, MergedType]] = {
    "ADALORA": MergedType("AdaLoRA", "lora_", shared=True),
    "BOFT": MergedType("BOFT", "boft_"),
    "C3A": MergedType("C3A", "c3a_"),
    "DELORA": MergedType("DeLoRA", "delora_"),
    "FOURIERFT": MergedType("FourierFT", "fourierft_"),
    "GRALORA": MergedType("GraLoRA", "gralora_"),
    "HIRA": MergedType("HiRA", "hira_"),
    "HRA": MergedType("HRA", "hra_"),
    "IA3": MergedType("IA3", "ia3_"),
    "LN_TUNING": MergedType("LN tuning", "ln_tuning_"),
    "LOHA": MergedType("LoHa", "hada_"),
    "LOKR": MergedType("LoKr", "lokr_"),
    "MISS": MergedType("MiSS", "miss_"),
    "OFT": MergedType("OFT", "oft_"),
    "OSF": MergedType("OSF", "osf_"),
    "PSOFT": MergedType("PSOFT", "psoft_"),
    "PVERA": MergedType("PVeRA", "pvera_", shared=True),
    "RANDLORA": MergedType("RandLora", "randlora_", shared=True),
    "ROAD": MergedType("RoAd", "road_"),
    "SHIRA": MergedType("SHiRA", "shira_"),
    "VBLORA": MergedType("VB-LoRA", "vblora_", shared=True),
    "VERA": MergedType("VeRA", "vera_", shared=True),
    "WAVEFT": MergedType("WaveFT", "waveft_"),
}
_RAW_LORA: Final = MergedType("LoRA", "lora_")

_ADDS_INPUTS: Final = "the adapter puts trained vectors before the input of the model, which no weight can represent"
_ADDS_STATES: Final = "the adapter adds trained keys and values to the attention, which no weight can represent"
_MIXES: Final = "the adapter mixes several updates in proportions that depend on the input"
_REASONS: Final[Mapping[str, str]] = {
    "ADAPTION_PROMPT": _ADDS_STATES,
    "CARTRIDGE": _ADDS_STATES,
    "CPT": _ADDS_INPUTS,
    "MULTITASK_PROMPT_TUNING": _ADDS_INPUTS,
    "P_TUNING": _ADDS_INPUTS,
    "POLY": "the adapter mixes several updates in proportions that depend on the task of each input",
    "PREFIX_TUNING": _ADDS_STATES,
    "PROMPT_TUNING": _ADDS_INPUTS,
    "XLORA": _MIXES,
}
_UNKNOWN: Final = "ttexport does not know whether weights can represent the effect of this adapter type"


def merged_type(config: Mapping[str, Any]) -> MergedType | None:
    """Return the type of the adapter with the config ``config`` if only PEFT can merge the adapter, else None."""
    if config.get("peft_type") == "LORA":
        return _RAW_LORA if config.get("init_lora_weights") in REPEATABLE_INITS else None
    return MERGED.get(str(config.get("peft_type")))


def refusal(config_path: Path, peft_type: str, *, via_peft: bool) -> NotExpressible:
    """Return the error for an adapter that cannot be merged. via_peft: whether ``--via peft`` was given."""
    name = f"{config_path}: peft_type {peft_type}"
    if peft_type in MERGED and not via_peft:
        reason = "only adapters of the types TRAINABLE_TOKENS and LORA can be merged without PEFT"
        return NotExpressible(name, reason, instead=VIA_PEFT)
    reason = _REASONS.get(peft_type, _UNKNOWN)
    listed = ", ".join(["TRAINABLE_TOKENS", "LORA", *sorted(MERGED)])
    return NotExpressible(name, reason, instead=f"ttexport can merge adapters of the types {listed}")
