"""Check that the base plus a GGUF LoRA equals the tuned model, without using the exporter's code.

For the embedding and the head, the product of the LoRA factors is added to the base, and the rows of the sum are
compared with the tuned model's rows. For matrices other than embedding and head, only the norms of the updates in the
GGUF and in the adapters are compared, because llama.cpp reorders the rows of some matrices and norms do not depend on
the order of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from exporter.errors import UnreadableFile
from exporter.sources.gguf.file import GgufFile, is_adapter
from exporter.sources.gguf.types import MAGIC
from exporter.tensors import Array, cast, read
from exporter.verify.expect.expected import Expected
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check, Report, Skip
from exporter.verify.tolerances import LORA_NOISE
from exporter.verify.values.computed import sample

#: Number of changed rows per factor pair that are checked if a check covers only a sample of the rows.
_TOUCHED: Final = 1024
_VOCABULARY: Final = ("token_embd.weight", "output.weight")


def is_lora(path: Path) -> bool:
    """Whether ``path`` is a GGUF file that contains an adapter."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return False
    return is_adapter(path)


def verify_lora(path: Path, reference: Reference, level: str, say: Callable[[str], None]) -> Report:
    """Check the LoRA factors in a GGUF file that contains only a LoRA adapter.

    The GGUF LoRA is not run in llama.cpp, because llama.cpp can run a LoRA only together with a GGUF of the base.
    """
    say(f"checking the LoRA factors in {path.name}")
    checks = list(check_lora(path, reference, every=level != "rows"))
    skipped = (
        [Skip("logits", "a GGUF LoRA can be run only together with a GGUF of the base")] if level == "full" else []
    )
    return Report(artifact=path, format="gguf-lora", level=level, checks=checks, facts={}, skipped=skipped)


def check_lora(path: Path, reference: Reference, *, every: bool) -> Iterator[Check]:
    """Yield the checks of a GGUF LoRA file.

    every: True to check all rows of embedding and head, False to check the trained rows and a sample of the untrained
    rows.
    """
    file = GgufFile.open(path)
    pairs = _pairs(file)
    limit = LORA_NOISE[next(iter(file.tensors.values())).type]
    uses = {"token_embd.weight": reference.embedding, "output.weight": reference.head}
    for name, want in uses.items():
        if want.changed or name in pairs:
            yield _check_rows(name, pairs.get(name), want, limit, every=every)
    yield _check_norms([pair for name, pair in pairs.items() if name not in _VOCABULARY], reference, limit)


@dataclass(frozen=True)
class _Pair:
    """The two LoRA factors that a GGUF stores for one tensor.

    a: the stored factor lora_a, converted to float64. b: the stored factor lora_b, converted to float64. scale: the
    number by which llama.cpp multiplies the product of ``a`` and ``b``. transposed: True if row i of the updated tensor
    is changed by row i of ``a``, and False if changed by row i of ``b``.
    """

    a: Array
    b: Array
    scale: float
    transposed: bool

    @property
    def touched(self) -> list[int]:
        """The indices of the rows of the updated tensor that the LoRA factors change."""
        rows: list[int] = np.flatnonzero((self.a if self.transposed else self.b).any(axis=1)).tolist()
        return rows

    def rows(self, ids: Sequence[int]) -> Array:
        """Return the values that the LoRA adds to the base rows ``ids``, as a float64 array of shape (n, width)."""
        left, right = (self.a, self.b.T) if self.transposed else (self.b, self.a)
        added: Array = self.scale * (left[list(ids)] @ right)
        return added


def _pairs(file: GgufFile) -> dict[str, _Pair]:
    alpha = float(file.metadata.get("adapter.lora.alpha", 0.0))
    pairs = {}
    for name in file.tensors:
        stem = name.removesuffix(".lora_a")
        if stem == name:
            continue
        if f"{stem}.lora_b" not in file.tensors:
            raise UnreadableFile(file.path, f"{name}: expected a matching tensor {stem}.lora_b, found no such tensor")
        a, b = (_values(file, f"{stem}.lora_{end}") for end in "ab")
        rank = b.shape[1]
        pairs[stem] = _Pair(a, b, alpha / rank if alpha else 1.0, transposed=stem == "token_embd.weight")
    return pairs


def _values(file: GgufFile, name: str) -> Array:
    return cast(file.dequantize_rows(name, 0, file.tensors[name].n_rows), "F64")


def _check_rows(name: str, pair: _Pair | None, want: Expected, limit: float, *, every: bool) -> Check:
    """Compare rows of the base plus the LoRA product with the expected rows of the tuned model.

    The deviation of a row is the largest absolute difference from the expected row, divided by the largest absolute
    value of the expected row. If the GGUF has no LoRA factors for a matrix that an adapter replaces, the adapter's
    matrix must equal the base's matrix bit for bit.
    """
    n_rows = want.base.spec.n_rows
    if pair is None and (want.rows or want.computed):
        return Check(name=f"{name} rows", passed=False, detail=f"{name}: expected LoRA factors, found no LoRA factors")
    limit = limit if pair else 0.0
    # A one-hot pair changes few rows. An ordinary update changes all rows.
    touched = pair.touched[:_TOUCHED] if pair else []
    ids = list(range(n_rows)) if every else sorted({*want.rows, *sample(n_rows), *touched})
    worst, where = 0.0, 0
    for start in range(0, len(ids), 1024):
        some = ids[start : start + 1024]
        base = np.concatenate([want.base.rows(row, row + 1) for row in some]).astype(np.float64)
        wide = want.values(some)
        tuned = base + pair.rows(some) if pair else base
        off = np.abs(tuned - wide).max(axis=1) / np.maximum(np.abs(wide).max(axis=1), 1e-30)
        off[~np.isfinite(off)] = np.inf
        if off.max() > worst:
            worst, where = float(off.max()), some[int(off.argmax())]
    detail = (
        f"compared {len(want.rows)} trained rows and {len(ids) - len(want.rows)} untrained rows with the tuned model"
    )
    if worst > limit:
        detail = f"{name}: base plus LoRA product differs from the tuned model in the row of token {where}"
    return Check.at_most(f"{name} rows", worst, limit, detail)


def _check_norms(pairs: Sequence[_Pair], reference: Reference, limit: float) -> Check:
    """Check that a GGUF LoRA and the adapters update equally many inner matrices, and that the update norms agree.

    Inner matrices are all matrices except embedding and head.
    """
    uses = (reference.embedding, reference.head)
    wanted = [want for want in reference.tensors.values() if want.updates and want not in uses]
    norms = sorted(_product_norm(pair.scale * pair.b, pair.a) for pair in pairs)
    expected_norms = sorted(
        _product_norm(
            np.concatenate([part.scaling * cast(read(part.up), "F64") for part in want.updates], axis=1),
            np.concatenate([cast(read(part.down), "F64") for part in want.updates]),
        )
        for want in wanted
    )
    if len(norms) != len(expected_norms):
        detail = (
            f"expected LoRA factors for {len(expected_norms)} matrices other than embedding and head, "
            f"found LoRA factors for {len(norms)} such matrices"
        )
        return Check(name="updates", passed=False, detail=detail)
    worst = max(
        (abs(norm - expected) / max(expected, 1e-30) for norm, expected in zip(norms, expected_norms, strict=True)),
        default=0.0,
    )
    detail = f"compared the Frobenius norms of {len(norms)} LoRA updates other than those of embedding and head"
    return Check.at_most("updates", worst, limit, detail)


def _product_norm(left: Array, right: Array) -> float:
    """Return the Frobenius norm of left @ right, without computing the product."""
    return float(np.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))))
