"""Build the token sequences for comparing logits.

The sequences are control texts, the user's prompts, and control texts into which the trained tokens are inserted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exporter.errors import BadInput, UnreadableFile, reading
from exporter.verify.expect.added_tokens import loaded_tokens
from exporter.verify.expect.reference import Reference
from exporter.verify.running.control_texts import CONTROL_TEXTS, MORE_TEXTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # loaded only before a model runs

#: Kinds of positions. A position with a trained token and a trained next token counts as "trained as input".
KINDS: Final = ("control", "user", "trained as input", "trained as target", "beside trained")
#: Maximum length of a sequence. The length is enough for attention to matter, and a few copies of full logits with a
#: vocabulary of 150k fit into memory.
_MAX_TOKENS: Final = 40
#: Number of trained tokens inserted into a control text. Four tokens leave most of the text intact. If more than
#: ``_MAX_SEQUENCES`` sequences were needed, more tokens are inserted per sequence, so that the cost does not grow with
#: the number of trained tokens.
_TRAINED_PER_SEQUENCE: Final = 4
_MAX_SEQUENCES: Final = 16
#: Maximum size on disk of one set of logits of ``more`` texts: 1,365 positions with a vocabulary of 49,152.
_MORE_BYTES: Final = 1 << 28


@dataclass(frozen=True)
class Sequences:
    """The token sequences on which the artifact and the reference model are run.

    control: token ids of the control texts, without trained tokens. user: token ids of the user's prompts. trained:
    token ids of control texts into which trained tokens are inserted.
    texts, text_ids: all texts and their token ids, including texts of trained tokens.
    covered: the trained token ids that occur in ``trained``, both as input tokens and as target tokens. If ``trained``
    is too short for all trained ids, ``covered`` is a sample of the trained ids.
    words: token id → text of the token. more: additional sequences with and without trained tokens, for statistics that
    need many positions.
    """

    control: list[list[int]]
    user: list[list[int]]
    trained: list[list[int]]
    texts: list[str]
    text_ids: list[list[int]]
    covered: list[int]
    words: dict[int, str] = field(default_factory=dict)
    more: list[list[int]] = field(default_factory=list)

    @property
    def all(self) -> list[list[int]]:
        """Return the control texts, then the user's prompts, then the sequences with trained tokens."""
        return self.control + self.user + self.trained

    @property
    def many(self) -> list[list[int]]:
        """Return the sequences in ``all``, followed by the sequences in ``more``."""
        return self.all + self.more

    def kinds(self) -> Iterator[list[str]]:
        """Yield, for each sequence of ``all``, a list with the kind of each position, such as "trained as input"."""
        trained = set(self.covered)
        yield from (["control"] * len(ids) for ids in self.control)
        yield from (["user"] * len(ids) for ids in self.user)
        for ids in self.trained:
            yield [
                "trained as input" if here in trained else "trained as target" if after in trained else "beside trained"
                for here, after in zip(ids, [*ids[1:], None], strict=True)
            ]


def build_sequences(reference: Reference, prompts: Sequence[str]) -> Sequences:
    """Encode the texts with the tuned model's tokenizer, without adding special tokens, and insert the trained tokens.

    Raises BadInput if tokenizer.json is missing or if every control text is too short to compare logits.
    """
    tokenizer = _tokenizer(reference)
    limit = min(_MAX_TOKENS, reference.max_positions or _MAX_TOKENS)
    trained_ids = set(reference.trained_ids)
    texts = [*CONTROL_TEXTS, *prompts]
    text_ids = [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]

    def untrained(encoded: Iterable[Sequence[int]]) -> list[list[int]]:
        left = ([token for token in ids if token not in trained_ids] for ids in encoded)
        return [ids[:limit] for ids in left if len(ids) > 1]

    control = untrained(text_ids[: len(CONTROL_TEXTS)])
    if not control:
        raise BadInput(
            f"{reference.checkpoint.path}: expected a control text with at least two untrained tokens, "
            "found no such control text"
        )
    user = [ids[:limit] for ids in text_ids[len(CONTROL_TEXTS) :] if len(ids) > 1]
    trained, covered = weave(reference.trained_ids, control, limit)
    known = {token for ids in (*control, *user, *trained) for token in ids}
    words = {token: _word(tokenizer, token) for token in sorted(known)}
    further = untrained(tokenizer.encode(text, add_special_tokens=False).ids for text in MORE_TEXTS)
    more = _more(further, covered, limit, _MORE_BYTES // (4 * reference.vocab))
    return Sequences(control, user, trained, texts, text_ids, covered, words, more)


def weave(token_ids: Sequence[int], carriers: Sequence[Sequence[int]], limit: int) -> tuple[list[list[int]], list[int]]:
    """Insert the tokens ``token_ids`` into copies of the token sequences ``carriers``.

    Returns the new sequences and a list of the inserted tokens.

    Each inserted token is the input at one position and the target at the preceding position. At most
    ``_MAX_SEQUENCES`` sequences of at most ``limit`` tokens are returned. If not all of ``token_ids`` fit into the
    sequences, an evenly spaced sample of ``token_ids`` is inserted.
    """
    most = _MAX_SEQUENCES * (limit - 1)
    covered = _spread(token_ids, most)
    each = max(min(_TRAINED_PER_SEQUENCE, limit - 1), -(-len(covered) // _MAX_SEQUENCES))
    groups = [covered[first : first + each] for first in range(0, len(covered), each)]
    return [_woven(carriers[number % len(carriers)], group, limit) for number, group in enumerate(groups)], covered


def _more(carriers: Sequence[Sequence[int]], covered: Sequence[int], limit: int, positions: int) -> list[list[int]]:
    """Return the control sequences, each followed by a copy into which trained tokens are inserted.

    The returned sequences have at most ``positions`` tokens in total.
    """
    each = min(_TRAINED_PER_SEQUENCE, limit - 1, len(covered))
    sequences: list[list[int]] = []
    for number, carrier in enumerate(carriers):
        group = [covered[(number * each + place) % len(covered)] for place in range(each)]
        for ids in (list(carrier), *([_woven(carrier, group, limit)] if group else [])):
            positions -= len(ids)
            if positions < 0:
                return sequences
            sequences.append(ids)
    return sequences


def read_prompts(path: Path) -> list[str]:
    """Read a text file with one prompt per line.

    Empty lines are skipped. Raises UnreadableFile if the file cannot be read, is not UTF-8, or contains no prompt.
    """
    with reading(path):
        content = path.read_bytes()
    try:
        lines = [line for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as exc:
        raise UnreadableFile(path, f"expected UTF-8 text, found an invalid byte at offset {exc.start}") from exc
    if not lines:
        raise UnreadableFile(path, "expected one prompt per line, found no prompt")
    return lines


def _tokenizer(reference: Reference) -> Tokenizer:
    from tokenizers import Tokenizer

    path = reference.tokenizer_file()
    if path is None and not reference.tokenizer:
        raise BadInput(
            f"{reference.checkpoint.path}: expected a tokenizer.json for encoding prompts, found no such file"
        )
    try:
        return Tokenizer.from_file(str(path)) if path else Tokenizer.from_str(json.dumps(_as_file(reference)))
    except Exception as exc:  # the tokenizers library raises bare Exception for every malformed file
        raise UnreadableFile(
            path or reference.checkpoint.path, f"the tokenizers library cannot load the file: {exc}"
        ) from exc


def _as_file(reference: Reference) -> dict[str, Any]:
    """Return the content of a tokenizer.json for a tokenizer that is stored as vocab.json and merges.txt."""
    content = reference.tokenizer
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = loaded_tokens(reference.auxiliary_files, content).values()
    added = [{"id": token.id, "content": token.text, "special": token.special, **flags} for token in tokens]
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    parts = {key: content[key] for key in ("normalizer", "pre_tokenizer", "model")}
    absent = {"truncation": None, "padding": None, "post_processor": None}
    return {"version": "1.0", **absent, **parts, "added_tokens": added, "decoder": decoder}


def _word(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token, or the tokenizer's internal spelling if the token is an incomplete character."""
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    own: str | None = tokenizer.id_to_token(token)
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else own or f"<{token}>"


def _spread(ids: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` evenly spaced elements of ``ids``, including the first and the last id."""
    if len(ids) <= count:
        return list(ids)
    return [ids[round(step * (len(ids) - 1) / max(1, count - 1))] for step in range(count)]


def _woven(carrier: Sequence[int], trained: Sequence[int], limit: int) -> list[int]:
    """Insert the trained tokens at evenly spread positions of the sequence ``carrier``.

    The result starts with a token of ``carrier``, so that every trained token is the target of a preceding position.
    """
    carried = min(len(carrier), limit - len(trained))
    # Number of the carrier's tokens before each trained token, at least 1.
    before = [max(1, number * carried // (len(trained) + 1)) for number in range(1, len(trained) + 1)]
    woven: list[int] = []
    for start, stop, token in zip([0, *before], before, trained, strict=False):
        woven += [*carrier[start:stop], token]
    return woven + list(carrier[before[-1] : carried])
