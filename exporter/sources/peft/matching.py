"""Matches module names against the names and patterns in an adapter's config, according to PEFT's rules.

Sources, in PEFT 0.21.2: ``_set_trainable`` (modules_to_save, trainable_token_indices), ``get_pattern_key``
(rank_pattern, alpha_pattern) and ``check_target_module_exists`` (target_modules).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from exporter.errors import UnreadableFile

_PATTERN_SECONDS: Final = 0.5


def wraps(name: str, module: str) -> bool:
    """Whether the config entry ``name`` makes PEFT wrap ``module`` or a module that contains ``module``.

    PEFT wraps every module whose path ends with ``name``, even if the match starts within a segment: for the entry
    ``norm``, PEFT wraps ``model.norm`` and also ``model.layers.0.input_layernorm``. Source:
    ``key.endswith(target_key)`` in ``_set_trainable``.
    """
    segments = module.split(".")
    return any(".".join(segments[:length]).endswith(name) for length in range(1, len(segments) + 1))


def targets(path: Path, target_modules: str | Sequence[str], module: str) -> bool:
    """Whether ``target_modules``, a list of names or a regular expression, makes PEFT apply LoRA to ``module``.

    A name has to match the last segments of the module's path, and a regular expression has to match the whole path.
    path: the config file, for error messages. Raises UnreadableFile if the regular expression is invalid.
    """
    if isinstance(target_modules, str):
        return _matches(path, target_modules, target_modules, module)
    return any(f".{module}".endswith(f".{name}") for name in target_modules)


def first_pattern(path: Path, patterns: Iterable[str], name: str) -> str | None:
    """Return the first regular expression in ``patterns`` that matches the last segments of ``name``, or None.

    path: the config file, for error messages. Raises UnreadableFile for an invalid regular expression.
    """
    return next((pattern for pattern in patterns if _matches(path, pattern, rf"(.*\.)?({pattern})", name)), None)


def _matches(path: Path, stated: str, pattern: str, name: str) -> bool:
    """Whether the whole ``name`` matches ``pattern``. stated: the expression in the config, for error messages."""
    import regex  # unlike re, regex has a timeout, so that a hostile pattern cannot hang a release

    try:
        return regex.match(rf"(?:{pattern})$", name, timeout=_PATTERN_SECONDS) is not None
    except (regex.error, TimeoutError) as exc:
        timed_out = isinstance(exc, TimeoutError)
        reason = "an expression that takes too long to match" if timed_out else f"an invalid expression ({exc})"
        raise UnreadableFile(path, f"{stated!r:.80}: expected a regular expression, found {reason}") from exc
