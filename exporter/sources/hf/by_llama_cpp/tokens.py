"""Tables of token texts to which llama.cpp gives a meaning, and notes on what llama.cpp does with a model's tokens.

llama.cpp finds ends of generation and some other tokens by their texts, whatever the token means in the model. A test
compares the tables with the installed llama.cpp. Source: llama_vocab::impl::load in llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Final

from exporter.sources.hf.by_llama_cpp.overlaps import contested

#: Texts of tokens at which llama.cpp ends generation. llama.cpp treats each of these tokens as a control token.
ENDS: Final = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
    }
)
#: Texts of fill-in-the-middle tokens at which llama.cpp ends generation: padding, repository names, file separators.
FILL_ENDS: Final = frozenset(
    {
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
        "<|file_sep|>",
    }
)
#: Texts of other fill-in-the-middle tokens, which llama.cpp treats as control tokens.
FILL_CONTROLS: Final = frozenset(
    {
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>"),
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>", "\u2581<SUF>"),
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>"),
        *("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", "<|prefix|>", "<|suffix|>", "<|middle|>"),
    }
)
#: Texts of tokens that llama.cpp always prints, even if the file gives the type of a control token.
SHOWN: Final = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})
#: (text, groups of other texts): llama.cpp does not end generation at the token with the text if the vocabulary
#: contains all texts of one of the groups.
NO_ENDS: Final[Sequence[tuple[str, Sequence[frozenset[str]]]]] = (
    (
        "<|end|>",
        (
            frozenset({"<|return|>", "<|call|>"}),
            frozenset({"<|return|>", "<|calls|>"}),
            frozenset({"<|flush|>", "<|call|>"}),
            frozenset({"<|flush|>", "<|calls|>"}),
        ),
    ),
    ("</s>", (frozenset({"<|tool_response>"}),)),
)

_TEXTS: Final = ENDS | FILL_ENDS
#: Number of tokens that a note names.
_NAMED: Final = 6


@dataclass(frozen=True, slots=True)
class MatchedToken:
    """A token whose text is matched as a whole before a text is split into smaller tokens (an added token).

    normalized: the flag of the tokenizers library, which matches tokens without the flag first. control: whether a GGUF
    stores the token as a control token.
    """

    id: int
    text: str
    normalized: bool = False
    control: bool = False


def looks_like_control(text: str) -> bool:
    """Whether llama.cpp's converter stores an added token as a control token because of its text alone.

    Source: does_token_look_special in conversion/base.py.
    """
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def ends_generation(text: str, vocabulary: Collection[str]) -> bool:
    """Whether llama.cpp ends generation at a token because of its text. vocabulary: the texts of all tokens."""
    return text in _TEXTS and not (text in dict(NO_ENDS) and _group(text, vocabulary))


def token_notes(
    vocabulary: Mapping[str, int], matched: Iterable[MatchedToken], taught: Set[int], ends: Collection[int]
) -> list[str]:
    """Return a sentence for each way in which llama.cpp treats a model's taught tokens unlike transformers.

    vocabulary: maps the text of every token to its id. matched: the added tokens. taught: the ids of the trained and of
    the new tokens. ends: the ids at which transformers ends generation. Time: linear in the length of all added tokens.
    """
    if not taught:
        return []
    matched = list(matched)
    texts = {token.id: token.text for token in matched if token.id in taught}
    texts |= {vocabulary[text]: text for text in (_TEXTS | FILL_CONTROLS | SHOWN) & vocabulary.keys()}
    known = {token_id: texts[token_id] for token_id in sorted(taught) if token_id in texts}
    return [
        *_end_notes(known, vocabulary, ends),
        *_lost_end_notes(vocabulary, taught, ends),
        *_print_notes(known, vocabulary, {token.id for token in matched if token.control}),
        *_overlap_notes(matched, taught),
    ]


def _end_notes(known: Mapping[int, str], vocabulary: Mapping[str, int], ends: Collection[int]) -> Iterator[str]:
    stops = {i: text for i, text in known.items() if i not in ends and ends_generation(text, vocabulary)}
    if stops:
        yield f"llama.cpp ends generation at {_names(stops)} because of the text, but transformers does not"


def _lost_end_notes(vocabulary: Mapping[str, int], taught: Set[int], ends: Collection[int]) -> Iterator[str]:
    for text, _ in NO_ENDS:
        group = _group(text, vocabulary) if text in vocabulary else None
        if group is None or not taught & {vocabulary[name] for name in group | {text}}:
            continue
        others = _names({vocabulary[name]: name for name in sorted(group)})
        role = "the end-of-sequence token " if vocabulary[text] in ends else ""
        yield (
            f"llama.cpp does not end generation at {role}{_names({vocabulary[text]: text})}, "
            f"because the vocabulary also contains {others}"
        )


def _print_notes(known: Mapping[int, str], vocabulary: Mapping[str, int], controls: Collection[int]) -> Iterator[str]:
    hidden = {
        token_id: text
        for token_id, text in known.items()
        if (token_id in controls or text in FILL_CONTROLS)
        and text not in SHOWN
        and not ends_generation(text, vocabulary)
        and text not in dict(NO_ENDS)
    }
    if hidden:
        yield f"llama.cpp omits the control tokens {_names(hidden)} from printed text, unless a program asks for them"
    if shown := {token_id: text for token_id, text in known.items() if text in SHOWN and token_id in controls}:
        yield f"llama.cpp always prints {_names(shown)}, because llama.cpp does not treat the text as a control token"


def _overlap_notes(matched: Sequence[MatchedToken], taught: Set[int]) -> Iterator[str]:
    normalized = {token.text: token.normalized for token in matched}
    pairs = contested(normalized, {token.text for token in matched if token.id in taught})
    for left, right in pairs:
        yield (
            f"where {left!r} and {right!r} overlap, llama.cpp matches the longest token of the vocabulary first, "
            "but transformers matches the first token in the text"
        )


def _group(text: str, vocabulary: Collection[str]) -> frozenset[str] | None:
    groups = dict(NO_ENDS)[text]
    return next((group for group in groups if all(name in vocabulary for name in group)), None)


def _names(tokens: Mapping[int, str]) -> str:
    """Format tokens (id → text) for a note, as ``'<a>' (id 1) and '<b>' (id 2)``."""
    named = [f"{text!r} (id {token_id})" for token_id, text in list(tokens.items())[:_NAMED]]
    if more := len(tokens) - len(named):
        named.append(f"{more} more")
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
