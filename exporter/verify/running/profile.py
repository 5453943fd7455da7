"""Collect the data for a report's plots: averages for each kind of position, each token's KL, and sampled logits."""

from __future__ import annotations

from typing import Final

import numpy as np

from exporter.verify.findings import Profile, Trace
from exporter.verify.running.logits import Reader
from exporter.verify.running.metrics import Distance
from exporter.verify.running.prompts import KINDS, Sequences

#: Numbers of positions and columns with a pair of logits in a report, enough to see systematic deviations in a plot.
_POSITIONS: Final = 80
_COLUMNS: Final = 5


def profile(distance: Distance, sequences: Sequences, want: Reader, want_name: str, got: Reader) -> Profile:
    """Return the data for the plots of one artifact.

    distance: distance between the artifact's logits ``got`` in a full pass and the reference logits ``want``, over all
    sequences in order.
    """
    kinds = list(sequences.kinds())
    flat_kinds = np.array([position_kind for row in kinds for position_kind in row])
    figures = {"all": distance.figures()}
    figures |= {
        position_kind: distance.at(flat_kinds == position_kind).figures()
        for position_kind in KINDS
        if (flat_kinds == position_kind).any()
    }
    traces, start = [], 0
    for ids, row in zip(sequences.all, kinds, strict=True):
        part = distance.at(slice(start, start := start + len(ids)))
        words = [sequences.words[token] for token in ids]
        traces.append(Trace(words, row, part.kl_at.tolist(), part.max_abs_at.tolist()))
    return Profile(figures, traces, _pairs(sequences, want, want_name, got))


def _pairs(sequences: Sequences, want: Reader, want_name: str, got: Reader) -> list[tuple[float, float]]:
    """Return pairs (reference logit, artifact logit) from positions that are spread over all sequences.

    At each sampled position, pairs are returned for the reference's top-1 token and for tokens spread over the
    vocabulary.
    """
    places = [(number, position) for number, ids in enumerate(sequences.all) for position in range(len(ids))]
    pairs = []
    for number, position in places[:: -(-len(places) // _POSITIONS)]:
        want_row, got_row = want(f"{want_name}.{number}")[position], got(f"full.{number}")[position]
        columns = {int(want_row.argmax()), *np.linspace(0, len(want_row) - 1, _COLUMNS - 1).astype(int).tolist()}
        pairs += [(float(want_row[column]), float(got_row[column])) for column in sorted(columns)]
    return pairs
