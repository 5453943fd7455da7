"""Reads a byte-level BPE tokenizer that is stored as vocab.json and merges.txt instead of tokenizer.json.

The two files lack the normalizer and the pre-tokenizer, which transformers' tokenizer class contains. The result has
the form of a parsed tokenizer.json. Sources: the classes in transformers' folders gpt2, gpt_neox, qwen2 and qwen3_5,
the choice of a class in ``AutoTokenizer.from_pretrained``, and the reader of merges in the tokenizers library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotExpressible, UnreadableFile
from exporter.io.files import read_file
from exporter.sources.hf.tokenizer import read_vocabulary

VOCABULARY: Final = "vocab.json"
MERGES: Final = "merges.txt"

_NFC: Final = {"type": "NFC"}
_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35: Final = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_END: Final = "<|endoftext|>"
_QWEN_TOKENS: Final = {"unk_token": _END, "eos_token": _END, "pad_token": _END}
_GPT_TOKENS: Final = {"unk_token": _END, "bos_token": _END, "eos_token": _END}

#: Tokenizer class → (normalizer, expression of the Split before ByteLevel or None, tokens with a role by default).
_CLASSES: Final[Mapping[str, tuple[Mapping[str, Any] | None, str | None, Mapping[str, str]]]] = {
    "GPT2Tokenizer": (None, None, _GPT_TOKENS),
    "GPTNeoXTokenizer": (_NFC, None, {**_GPT_TOKENS, "pad_token": "<|padding|>"}),
    "Qwen2Tokenizer": (_NFC, _QWEN2, _QWEN_TOKENS),
    "Qwen3_5Tokenizer": (_NFC, _QWEN35, _QWEN_TOKENS),
}
#: Model type → tokenizer class, if tokenizer_config.json names no class.
_BY_MODEL_TYPE: Final = {
    **dict.fromkeys(
        ("codegen", "dbrx", "gpt2", "gpt_neo", "gptj", "jais2", "opt", "phi", "starcoder2"), "GPT2Tokenizer"
    ),
    **dict.fromkeys(("falcon_mamba", "gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"), "Qwen3_5Tokenizer"),
}
#: Model types for which transformers does not use the class in tokenizer_config.json.
_FIXED: Final = frozenset({"qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"})


def read_vocabulary_files(
    files: Mapping[str, Path], settings: Mapping[str, Any], model_type: object
) -> dict[str, Any] | None:
    """Return the tokenizer in vocab.json and merges.txt as a parsed tokenizer.json, or None without the two files.

    The additional key ``default_tokens`` contains the tokens with a role that the tokenizer class gives by default.
    settings: the parsed tokenizer_config.json. model_type: the model type in config.json.
    Raises NotExpressible for an unknown tokenizer class, and UnreadableFile if a file cannot be parsed.
    """
    if VOCABULARY not in files or MERGES not in files:
        return None
    registered = _BY_MODEL_TYPE.get(str(model_type))
    stated = str(settings.get("tokenizer_class") or registered).removesuffix("Fast")
    name = registered if registered and model_type in _FIXED else stated
    if name not in _CLASSES:
        raise NotExpressible(
            f"gguf: {files[VOCABULARY]}",
            f"expected a tokenizer class with a known pre-tokenizer ({', '.join(_CLASSES)}), found {name}",
            instead="write a tokenizer.json with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    normalizer, expression, tokens = _CLASSES[name]
    prefix = bool(settings.get("add_prefix_space"))
    pre_tokenizer: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": expression is None}
    pre_tokenizer["trim_offsets"] = True
    if expression is not None:
        split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, pre_tokenizer]}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "model": {"type": "BPE", "vocab": read_vocabulary(files[VOCABULARY]), "merges": _merges(files[MERGES])},
        "default_tokens": tokens,
    }


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = read_file(path).decode().split("\n")
    except UnicodeDecodeError as exc:
        raise UnreadableFile(path, "expected text in UTF-8, found bytes that are not UTF-8") from exc
    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if line.startswith("#version") or (number == len(lines) and not line):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise UnreadableFile(path, f"line {number}: expected two tokens with a space between, found {line!r:.80}")
        pairs.append((parts[0], parts[1]))
    return pairs
