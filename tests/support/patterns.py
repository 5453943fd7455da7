"""Texts that match a regular expression."""

from __future__ import annotations

import random
import re
import string
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Final

_CLASSES: Final = {
    codes.CATEGORY_DIGIT: string.digits,
    codes.CATEGORY_WORD: string.ascii_lowercase + string.digits + "_",
}


def sample(pattern: str, seed: int) -> str:
    """Return a text that matches the parts of ``pattern`` that consume text; assertions may fail on the text."""
    return _text(parser.parse(pattern), random.Random(seed))


def _text(items: Any, dice: random.Random) -> str:
    return "".join(_item(code, value, dice) for code, value in items)


def _item(code: Any, value: Any, dice: random.Random) -> str:
    match code:
        case codes.LITERAL:
            return chr(value)
        case codes.NOT_LITERAL:
            return "x" if value != ord("x") else "y"
        case codes.ANY:
            return dice.choice("abx1")
        case codes.IN:
            return _member(value, dice)
        case codes.BRANCH:
            return _text(dice.choice(value[1]), dice)
        case codes.SUBPATTERN:
            return _text(value[-1], dice)
        case codes.MAX_REPEAT | codes.MIN_REPEAT:
            least, most, repeated = value
            return "".join(_text(repeated, dice) for _ in range(dice.randint(least, min(most, least + 2))))
        case codes.AT | codes.ASSERT | codes.ASSERT_NOT:
            return ""
        case _:
            raise ValueError(f"expected a regular expression without {code}")


def _member(choices: Any, dice: random.Random) -> str:
    if choices[0][0] == codes.NEGATE:
        excluded = re.compile("[" + "".join(chr(value) for code, value in choices[1:] if code == codes.LITERAL) + "]")
        return dice.choice([each for each in string.ascii_lowercase if not excluded.match(each)])
    code, value = dice.choice(choices)
    match code:
        case codes.RANGE:
            return chr(dice.randint(*value))
        case codes.CATEGORY:
            return dice.choice(_CLASSES[value])
        case _:
            return chr(value)
