"""A table that maps the pre-tokenizer structures of published tokenizers to llama.cpp's pre-tokenizer names.

Sources: the tokenizer.json of each named model, and the regular expressions and flags in llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

Step = tuple[object, ...]

#: The regular expression of ByteLevel in the tokenizers package.
GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LETTERS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3: Final = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2: Final = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35: Final = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UFAKZEKA: Final = rf"{_LETTERS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_MINICPM5: Final = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}+|{_SIGNS}|{_SPACES}"

_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD: Final = r"[^\r\n\p{L}\p{N}]?"
_CASED_TAIL: Final = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN: Final = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}"
_O200K: Final = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_TAIL}"
)
_NOT_HAN_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_NOT_HAN_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI: Final = (
    rf"[\p{{Han}}]+|{_LEAD}{_NOT_HAN_UPPER}*{_NOT_HAN_LOWER}+{_CONTRACTIONS}?"
    rf"|{_LEAD}{_NOT_HAN_UPPER}+{_NOT_HAN_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
)

_PUNCTUATED: Final = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3: Final = rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}".replace(r"\"", '"')
_SPARK: Final = rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+".replace(r"\"", '"')
_CJK_KANA: Final = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_HANGUL: Final = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
#: The letters of bicameral scripts, as DeepSeek's first tokenizer lists them.
_CASED_LETTERS: Final = (
    r"\s?[A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)
_DEEPSEEK_SIGNS: Final = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_BLOOM: Final = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
_BAILING: Final = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
_SEED: Final = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_EXAONE_MOE: Final = (
    rf"{_CONTRACTIONS}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_JAIS2: Final = (
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+"
    + "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
    + r"|\s{1}"
)

#: Expressions that match every character of any text, so that removing the text between the matches removes nothing.
COVERING: Final = frozenset({GPT2, _LLAMA3, _QWEN2, _QWEN35, _TEKKEN, _O200K})

#: Known differences between transformers and llama.cpp, as clauses of a note.
_AT_MARKS: Final = "llama.cpp splits a word before a combining mark, such as a vowel sign of Devanagari or Thai"
_WIDE_SPACE: Final = "llama.cpp splits a run of spaces before the ideographic space U+3000"
_RETURNS: Final = "llama.cpp does not treat a carriage return before a line break as part of the line break"

BYTES: Final[Step] = ("ByteLevel", False, False)  # no prefix space; an earlier step has split the text
_DIGITS: Final[Step] = ("Digits", True)


def split(expression: str, behaviour: str = "Isolated") -> Step:
    """Return the pre-tokenizer step that splits a text at each match of the regular expression ``expression``."""
    return ("Split", "Regex", expression, behaviour, False)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A known pre-tokenizer, with its steps in tokenizer.json and its name in llama.cpp.

    by_model_type: maps each model type for which llama.cpp uses a different name to that name. ignore_merges: the value
    of the flag ``ignore_merges`` that the BPE model in tokenizer.json must have, or None if both values are accepted
    because the flag affects only vocabulary words that cannot be built by merges. difference: how llama.cpp's
    pre-tokenizer differs from the structure, or "" if no difference is known.
    """

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool | None = False
    by_model_type: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    difference: str = ""

    @property
    def names(self) -> frozenset[str]:
        """All names that llama.cpp uses for the pre-tokenizer."""
        return frozenset((self.name, *self.by_model_type.values()))


TABLE: Final = (
    PreTokenizer(
        "llama-bpe",
        (split(_LLAMA3), BYTES),
        ignore_merges=True,
        by_model_type={
            "falcon_h1": "falcon-h1",
            "lfm2": "lfm2",
            "lfm2_moe": "lfm2",
            "glm4": "glm4",
            "glm4_moe": "glm4",
        },
    ),
    PreTokenizer("dbrx", (split(_LLAMA3), BYTES), by_model_type={"llama": "smaug-bpe"}),
    PreTokenizer(
        "qwen2",
        (split(_QWEN2), BYTES),
        by_model_type={"stablelm": "stablelm2", "hunyuan_v1_moe": "hunyuan", "solar_open": "solar-open"},
    ),
    PreTokenizer("qwen35", (split(_QWEN35), BYTES)),
    PreTokenizer("ufakzeka", (split(_UFAKZEKA), BYTES)),
    PreTokenizer("minicpm5", (split(r"\p{N}{1,3}"), split(_MINICPM5), BYTES), ignore_merges=None),
    PreTokenizer(
        "smollm",
        (_DIGITS, split(GPT2), BYTES),
        by_model_type={
            "starcoder2": "starcoder",
            "gpt_bigcode": "starcoder",
            "gpt_refact": "refact",
            "granite": "refact",
            "granitemoe": "refact",
            "granitemoehybrid": "refact",
            "cohere": "command-r",
            "cohere2": "command-r",
            "codeshell": "codeshell",
            "exaone": "exaone",
        },
    ),
    PreTokenizer(
        "gpt-2",
        (split(GPT2), BYTES),
        by_model_type={
            "mpt": "mpt",
            "gpt_neox": "mpt",  # MPT uses the tokenizer of GPT-NeoX
            "olmo": "olmo",
            "olmoe": "olmo",
            "jais": "jais",
            "phi": "phi-2",
            "exaone4": "exaone4",
        },
    ),
    PreTokenizer("tekken", (split(_TEKKEN), BYTES), ignore_merges=None, difference=_AT_MARKS),
    PreTokenizer(
        "gpt-4o",
        (split(_O200K), BYTES),
        ignore_merges=None,
        by_model_type={"llama4": "llama4", "llama4_text": "llama4", "minimax_m2": "minimax-m2"},
        difference=_AT_MARKS,
    ),
    PreTokenizer("kimi-k2", (split(_KIMI), BYTES), ignore_merges=None, difference=_AT_MARKS),
    PreTokenizer(
        "deepseek-llm",
        (
            split(r"[\r\n]"),
            split(_CASED_LETTERS),
            split(_DEEPSEEK_SIGNS),
            split(r"\s+$"),
            split(_CJK_HANGUL),
            _DIGITS,
            BYTES,
        ),
        difference=_WIDE_SPACE,
    ),
    PreTokenizer(
        "deepseek-coder",
        (split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(_CJK_HANGUL), _DIGITS, BYTES),
    ),
    PreTokenizer(
        "deepseek-v3",
        (split(r"\p{N}{1,3}"), split(_CJK_KANA), split(_DEEPSEEK3), BYTES),
        by_model_type={"hunyuan_v1_dense": "hunyuan-dense"},
    ),
    PreTokenizer("spark2_5", (split(r"\p{N}{1,3}"), split(_CJK_KANA), split(_SPARK), _DIGITS, BYTES)),
    PreTokenizer(
        "falcon",
        (("Punctuation", "Contiguous"), split(GPT2), BYTES, ("Digits", False), split("[0-9][0-9][0-9]")),
    ),
    PreTokenizer("bloom", (split(_BLOOM), BYTES), by_model_type={"poro": "poro-chat"}),
    PreTokenizer("viking", (split(_BLOOM), _DIGITS, BYTES)),
    PreTokenizer("bailingmoe", (split(_BAILING), BYTES), ignore_merges=None),
    PreTokenizer("seed-coder", (split(_SEED), BYTES), ignore_merges=None),
    PreTokenizer("exaone-moe", (split(_EXAONE_MOE), BYTES), ignore_merges=None),
    PreTokenizer("jais-2", (split(_JAIS2), BYTES), ignore_merges=None),
    PreTokenizer(
        "laguna",
        (split(r"(?:\r?\n)+(?!\r?\n)", "MergedWithNext"), split(_QWEN2), BYTES),
        ignore_merges=None,
        difference=_RETURNS,
    ),
)
