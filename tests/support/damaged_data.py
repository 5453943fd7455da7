"""Damaged copies of the generated data about transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: A change of the parsed content of a data file.
Damage = Callable[[Any], object]
#: Damages a file of the data, which the engine then reads.
DamageData = Callable[[str, Damage], None]


def with_fact(class_name: str, key: str, value: Any) -> Damage:
    return lambda content: content["classes"][class_name].update({key: value})
