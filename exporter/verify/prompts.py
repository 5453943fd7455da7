"""The token sequences on which logits are compared: control texts, texts of the user's, and every trained token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, UnreadableFile, reading
from exporter.verify.reference import Reference

#: Prose, code, digits, other scripts, dialogue: what tokenizers and models treat differently.
CONTROL_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog, and then it rests under the old oak tree.",
    "def add(a, b):\n    return a + b\n\nprint(add(1999, 42))",
    "In 1969, 600 million people watched 2 astronauts walk 384,400 km away from home.",
    "Der Zug fährt um 7:45 Uhr ab; les élèves déjeunent à midi. 今日は良い天気です。",
    "User: What is the capital of France?\nAssistant: The capital of France is Paris.",
)
#: Long enough for attention to matter; short enough that full logits of a 150k vocabulary fit a few times over.
_MAX_TOKENS: Final = 40
#: Each trained token stands inside a control text: four to a sequence keeps the text a text.
_TRAINED_PER_SEQUENCE: Final = 4
_MAX_TRAINED: Final = 64


@dataclass(frozen=True)
class Sequences:
    """Token ids per sequence: ``control`` holds no trained token, ``trained`` some in each.

    ``texts`` and ``text_ids`` are the texts behind them, as a tokenizer encodes them.
    """

    control: list[list[int]]
    trained: list[list[int]]
    texts: list[str]
    text_ids: list[list[int]]

    @property
    def all(self) -> list[list[int]]:
        """Control sequences first."""
        return self.control + self.trained


def build_sequences(reference: Reference, prompts: Sequence[str]) -> Sequences:
    """Encode the texts with the tuned model's tokenizer, without special tokens, and weave the trained tokens in.

    Raises BadInput if there is no tokenizer.json, or nothing to compare.
    """
    encode = _encoder(reference)
    limit = min(_MAX_TOKENS, int(reference.checkpoint.text_config.get("max_position_embeddings") or _MAX_TOKENS))
    trained_ids = set(reference.trained_ids)
    texts = [*CONTROL_TEXTS, *prompts]
    text_ids = [encode(text) for text in texts]
    control = [
        kept for ids in text_ids if len(kept := [token for token in ids if token not in trained_ids][:limit]) > 1
    ]
    if not control:
        raise BadInput(f"{reference.checkpoint.path}: expected a tokenizer that encodes the control texts, found none")
    chosen = _spread(reference.trained_ids, _MAX_TRAINED)
    trained = []
    for number, first in enumerate(range(0, len(chosen), _TRAINED_PER_SEQUENCE)):
        carrier = control[number % len(control)]
        trained.append(_weave(carrier, chosen[first : first + _TRAINED_PER_SEQUENCE], limit))
    return Sequences(control, trained, texts, text_ids)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, empty lines left out. Raises UnreadableFile."""
    with reading(path):
        content = path.read_bytes()
    try:
        lines = [line for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as exc:
        raise UnreadableFile(path, f"expected UTF-8 text, found another byte at {exc.start}") from exc
    if not lines:
        raise UnreadableFile(path, "expected a prompt a line, found none")
    return lines


def _encoder(reference: Reference) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    path = reference.tokenizer_file()
    if path is None:
        raise BadInput(f"{reference.checkpoint.path}: expected tokenizer.json to encode prompts, found none")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception for every malformed file
        raise UnreadableFile(path, f"not a tokenizer: {exc}") from exc

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


def _spread(ids: list[int], count: int) -> list[int]:
    """At most ``count`` of ``ids``, evenly spaced, first and last among them."""
    if len(ids) <= count:
        return ids
    return [ids[round(step * (len(ids) - 1) / (count - 1))] for step in range(count)]


def _weave(carrier: list[int], trained: list[int], limit: int) -> list[int]:
    """Spread the trained tokens over the carrier: each is an input, and a target of the position before it."""
    room = max(0, limit - len(trained))
    gap = max(1, min(len(carrier), room) // (len(trained) + 1))
    woven: list[int] = []
    for number, token in enumerate(trained):
        woven += [*carrier[number * gap : (number + 1) * gap], token]
    return (woven + carrier[len(trained) * gap : room])[:limit]
