"""Expect the base's rows in an artifact whose adapters were trained on a model with fewer rows.

A patch replaces token rows in an existing artifact and keeps all other rows. If the user reduced the vocabulary before
training, for example to the size of the tokenizer, the patched artifact has more rows than the model in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping

from exporter.tensors import first_difference
from exporter.verify.expect.expected import Expected


def keep_rows(wanted: Mapping[str, Expected]) -> None:
    """Expect all rows of the base in every reduced matrix, if the rows of the reduced matrices equal the base's rows.

    Otherwise, ``wanted`` stays unchanged, because a patch cannot express the reduced matrices. wanted: maps the name of
    each tensor to its expected values. Peak memory: one block of two tensors.
    """
    replaced = [
        want
        for want in wanted.values()
        if want.full is not None and want.full.in_place and want.source.spec.n_rows < want.base.spec.n_rows
    ]
    if any(first_difference(want.source, want.base, want.source.spec.n_rows) is not None for want in replaced):
        return
    for want in replaced:
        want.full = None
    for want in wanted.values():
        want.kept = None
