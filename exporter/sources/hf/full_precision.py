"""Raises an error if a base model is quantised, and names the unquantised checkpoint in the message if possible."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.quantised import Quantisation

#: Keys of a config that name the checkpoint from which a quantised checkpoint was made.
_NAMING_KEYS: Final = ("base_model", "base_model_name_or_path", "_name_or_path")
_STRONG: Final = (
    r"bnb|bitsandbytes|gptq|awq|hqq|aqlm|exl[23]|fp[48]|nvfp4|mxfp[48]|nf4|mlx|quantized|auto-?round|[2348][-_]?bits?"
    r"|u?int[48]|w\d+a\d+"
)
_WEAK: Final = r"dynamic|block|sym|asym|gemm|marlin|g?\d+g?|torchao|tensor|channel"
#: Pattern of the name of a quantised checkpoint: the name of the model, then the parts that quantisers append.
_QUANTISED_NAME: Final = re.compile(
    rf"(?P<name>.+?)[-_.](?:unsloth[-_](?:dynamic[-_])?)?(?:{_STRONG})(?:[-_.](?:{_STRONG}|{_WEAK}))*", re.IGNORECASE
)
#: The longest name of a folder, and more than a name on the hub may have.
_MAX_NAME: Final = 255
_HUB_ID: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
#: Accounts that publish quantised copies of models from other accounts. Such an account lacks the original model.
_COPYING_ACCOUNTS: Final = frozenset(
    {
        "amd",
        "casperhansen",
        "cpatonn",
        "cyankiwi",
        "hugging-quants",
        "ista-daslab",
        "kaitchup",
        "mlx-community",
        "modelcloud",
        "neuralmagic",
        "nm-testing",
        "nvidia",
        "quanttrio",
        "redhatai",
        "solidrust",
        "techxgenus",
        "thebloke",
    }
)


def full_precision_name(config: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Return the name of the unquantised original checkpoint, or None if config and ``names`` do not reveal the name.

    names: hub ids or paths of the quantised checkpoint. The result is a hub id if possible. If the hub account of the
    quantised checkpoint publishes only quantised copies of other accounts' models, the result is the model name without
    an account.
    """
    own = list(names)
    for value in (config.get(key) for key in _NAMING_KEYS):
        if isinstance(value, str) and _HUB_ID.fullmatch(value):
            if stripped := _without_suffix(value):
                return stripped
            if value not in own:
                return value
    return next((stripped for name in own if (stripped := _without_suffix(name))), None)


def _without_suffix(name: str) -> str | None:
    account, _, last = name.rstrip("/").rpartition("/")
    match = _QUANTISED_NAME.fullmatch(last) if len(last) <= _MAX_NAME else None
    if match is None:
        return None
    is_hub_id = _HUB_ID.fullmatch(name) and account.lower() not in _COPYING_ACCOUNTS
    return f"{account}/{match['name']}" if is_hub_id else match["name"]


def names_of(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the checkpoint's hub id if the checkpoint is in the hub's cache, and then the name of its folder."""
    for part in checkpoint.path.absolute().parts:
        if part.startswith("models--"):
            yield part.removeprefix("models--").replace("--", "/", 1)
    yield checkpoint.path.resolve().name


def require_full_precision(checkpoint: Checkpoint, *, purpose: str = "", names: Iterable[str] = ()) -> None:
    """Raise BadInput if the checkpoint is quantised.

    The error message names the unquantised original if its name is known. purpose: the operation that needs full
    precision, such as "to train". names: other names of the checkpoint.
    """
    if (quantisation := checkpoint.quantisation) is not None:
        raise BadInput(
            f"{_place(checkpoint, quantisation)}: expected a full-precision base{purpose and f' {purpose}'}, "
            f"found {quantisation.method}; {_remedy(checkpoint, names)}",
            path=checkpoint.path,
        )


def require_plain_rows(checkpoint: Checkpoint, *, updates: bool, untie: bool, names: Iterable[str] = ()) -> None:
    """Raise BadInput or NotExpressible if the changes of a merge cannot be stored in the quantised checkpoint.

    Token rows can be replaced exactly in FP8 and MXFP4 checkpoints, which store embedding and head as ordinary floats.
    updates: whether low-rank updates are to be merged. untie: whether a tied head is to be stored separately, which is
    impossible in a quantised checkpoint, because the quantiser's settings do not exempt the new head from quantisation.
    """
    quantisation = checkpoint.quantisation
    if quantisation is None:
        return
    if not quantisation.plain_rows:
        require_full_precision(checkpoint, names=names)
    if updates:
        require_full_precision(checkpoint, purpose="to merge updates of weight matrices", names=names)
    if untie and checkpoint.tie.tied:
        raise NotExpressible(
            f"--untie: {_place(checkpoint, quantisation)}",
            f"when the model is loaded, {quantisation.method} would quantise the head that --untie stores separately",
            instead=_remedy(checkpoint, names),
        )


def require_convertible(checkpoint: Checkpoint, target: str) -> None:
    """Raise NotExpressible if the checkpoint is quantised.

    target: the output format or the command, for the error message. The format or the command needs every matrix in
    full precision.
    """
    if (quantisation := checkpoint.quantisation) is not None:
        raise NotExpressible(
            f"{target}: {_place(checkpoint, quantisation)}",
            f"the matrices of the base are quantised with {quantisation.method}",
            instead=f"use --to hf to merge token rows into this base, or {_remedy(checkpoint, ())}",
        )


def _place(checkpoint: Checkpoint, quantisation: Quantisation) -> str:
    if quantisation.place in checkpoint.tensors:
        return f"{checkpoint.tensors[quantisation.place].place.path}: {quantisation.place}"
    return f"{checkpoint.path}/{quantisation.place}"


def _remedy(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    known = full_precision_name(checkpoint.config, (*names, *names_of(checkpoint)))
    before = f"the unquantised checkpoint {known}" if known else "the unquantised checkpoint"
    return f"use {before} as the base"
