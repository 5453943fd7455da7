"""Make PEFT use the tuner classes of this package, and restore PEFT's own classes afterwards."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft import tuners as stock_tuners
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import trainable_tokens as stock
from peft.tuners import tuners_utils
from peft.utils import PeftType
from peft.utils import other as stock_other
from torch import nn

from tuner.layers.config import TrainableTokensConfig
from tuner.layers.layer import TrainableTokensLayer
from tuner.layers.model import TrainableTokensModel
from tuner.layers.tying import tied_module_names

__all__ = ["Enabled", "enable", "get_peft_model", "load_peft_model"]

_OURS: dict[str, type] = {
    "TrainableTokensConfig": TrainableTokensConfig,
    "TrainableTokensLayer": TrainableTokensLayer,
    "TrainableTokensModel": TrainableTokensModel,
}
_stock_additional: Callable[..., None] = stock_other.set_additional_trainable_modules


def _set_additional_trainable_modules(
    model: nn.Module, peft_config: PeftConfig, model_config: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """Add trainable rows to an adapter of another type, such as LoRA.

    This function replaces PEFT's ``set_additional_trainable_modules``, which reads only from the config whether the
    head is tied. The replacement determines tied modules with ``tied_module_names``.
    """
    if getattr(peft_config, "trainable_token_indices", None) is not None:
        model_config = {**model_config, "tie_word_embeddings": bool(tied_module_names(model))}
    _stock_additional(model, peft_config, model_config, *args, **kwargs)


def _replacements() -> Iterator[tuple[MutableMapping[Any, Any], Any, Any]]:
    """Yield (namespace, name, replacement) for every class or function of PEFT that ``enable`` replaces.

    PEFT looks up the classes of an adapter type in two tables, whose entries for token rows are replaced. For a LoRA
    adapter with token rows, PEFT imports the row classes by name from its packages, so the names in these packages are
    replaced, too. The modules that define PEFT's classes are not changed, so existing models keep working. A class or
    function that the installed PEFT version does not have is skipped.
    """
    yield PEFT_TYPE_TO_TUNER_MAPPING, PeftType.TRAINABLE_TOKENS, TrainableTokensModel
    yield PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.TRAINABLE_TOKENS, TrainableTokensConfig
    packages: tuple[ModuleType, ...] = (peft, stock_tuners, stock)
    for package in packages:
        yield from ((vars(package), name, ours) for name, ours in _OURS.items() if name in vars(package))
    users: tuple[ModuleType, ...] = (stock_other, peft.utils, tuners_utils, peft.peft_model)
    for user in users:
        name = "set_additional_trainable_modules"
        if name in vars(user):
            yield vars(user), name, _set_additional_trainable_modules
    yield vars(stock_other), "_get_module_names_tied_with_embedding", tied_module_names


_LOCK = threading.Lock()
_users = 0
_saved: list[tuple[MutableMapping[Any, Any], Any, Any]] = []


class Enabled:
    """The result of ``enable``.

    PEFT's own classes are restored at the end of the ``with`` block or by a call of ``disable``.
    """

    def __init__(self) -> None:
        """Replace PEFT's classes, unless another ``Enabled`` has already replaced PEFT's classes."""
        global _users
        with _LOCK:
            if not _users:
                for namespace, name, ours in _replacements():
                    _saved.append((namespace, name, namespace[name]))
                    namespace[name] = ours
            _users += 1
        self._on = True

    def disable(self) -> None:
        """End the effect of this ``enable``.

        PEFT's classes are restored when the last active ``Enabled`` is disabled. A second call of ``disable`` does
        nothing.
        """
        global _users
        with _LOCK:
            if not self._on:
                return
            self._on = False
            _users -= 1
            while not _users and _saved:
                namespace, name, stock_object = _saved.pop()
                namespace[name] = stock_object

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.disable()


def enable() -> Enabled:
    """Make PEFT use the classes of this package for token rows, even for ``LoraConfig(trainable_token_indices=…)``.

    PEFT's classes stay replaced until ``disable`` is called on the result or, if ``enable`` is used as a context
    manager, until the end of the ``with`` block. Calls of ``enable`` may overlap and may end in any order. Models that
    are created while PEFT's classes are replaced keep working after ``disable``. Models that were created before
    ``enable`` was called are not changed. PEFT's classes are replaced in the whole process, so other threads that use
    PEFT also get the classes of this package.
    """
    return Enabled()


@contextmanager
def _without_noise() -> Iterator[None]:
    """Hide the deprecation warning about an attribute that transformers renamed and PEFT still uses under the old name.

    Users cannot act on the deprecation warning, because only a new version of PEFT can remove its cause.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Return ``model`` as a ``peft.PeftModel`` that uses the tuner of this package.

    ``kwargs``: see ``peft.get_peft_model``. The parameter ``peft_config`` may also be PEFT's own TrainableTokensConfig,
    or a LoraConfig with ``trainable_token_indices``. PEFT's own classes are restored before the function returns.
    """
    with enable(), _without_noise():
        wrapped: PeftModel = peft.get_peft_model(model, peft_config, adapter_name, **kwargs)
        return wrapped


def load_peft_model(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """Return ``model`` with the adapter in the folder ``path``, which stock PEFT or ttexport wrote.

    ``kwargs``: see ``peft.PeftModel.from_pretrained``.
    """
    with enable(), _without_noise():
        return PeftModel.from_pretrained(model, path, **kwargs)
