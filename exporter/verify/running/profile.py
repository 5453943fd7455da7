"""From logits to what a report shows of them: figures by kind of position, traces by token, some pairs of logits."""

from __future__ import annotations

from typing import Final

import numpy as np

from exporter.verify.findings import Profile, Trace
from exporter.verify.running.logits import Reader
from exporter.verify.running.metrics import Distance
from exporter.verify.running.prompts import KINDS, Sequences

#: Pairs of logits in a report: enough to see a bend or a stray cloud.
_POSITIONS: Final = 80
_COLUMNS: Final = 5


def profile(found: Distance, sequences: Sequences, want: Reader, want_name: str, got: Reader) -> Profile:
    """``found`` is the distance of ``got``'s full pass from ``want``, over all sequences in order."""
    kinds = list(sequences.kinds())
    flat = np.array([kind for row in kinds for kind in row])
    figures = {"all": found.figures()}
    figures |= {kind: found.at(flat == kind).figures() for kind in KINDS if (flat == kind).any()}
    traces, start = [], 0
    for ids, row in zip(sequences.all, kinds, strict=True):
        part = found.at(slice(start, start := start + len(ids)))
        words = [sequences.words[token] for token in ids]
        traces.append(Trace(words, row, part.kl_at.tolist(), part.max_abs_at.tolist()))
    return Profile(figures, traces, _pairs(sequences, want, want_name, got))


def _pairs(sequences: Sequences, want: Reader, want_name: str, got: Reader) -> list[tuple[float, float]]:
    """At positions spread over all sequences: the reference's best logit, and some spread over the vocabulary."""
    places = [(number, position) for number, ids in enumerate(sequences.all) for position in range(len(ids))]
    pairs = []
    for number, position in places[:: -(-len(places) // _POSITIONS)]:
        one, other = want(f"{want_name}.{number}")[position], got(f"full.{number}")[position]
        columns = {int(one.argmax()), *np.linspace(0, len(one) - 1, _COLUMNS - 1).astype(int).tolist()}
        pairs += [(float(one[column]), float(other[column])) for column in sorted(columns)]
    return pairs
