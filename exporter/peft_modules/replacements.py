"""Converts the changes that only PEFT can compute to whole tensors that replace tensors of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import Edit, FullModule
from exporter.sources.peft.types.changes import ByPeft


@dataclass(frozen=True, slots=True)
class Replacement(FullModule):
    """A weight that PEFT computes from ``change``. bias: the computed bias, or None if the bias does not change."""

    change: ByPeft
    bias: FullModule | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors in the adapter file from which PEFT computes the weight."""
        return self.change.keys


def replacements(checkpoint: Checkpoint, adapter: Adapter, *, process: str, dtype: str) -> Sequence[Edit]:
    """Return the edits of ``adapter``, with a ``Replacement`` for each change that only PEFT can compute.

    process: the Python module that computes the tensors in a new process. dtype: the dtype of the computed tensors. The
    process starts when a computed tensor is first read. Raises TensorMismatch or NotExpressible if a change does not
    fit the base.
    """
    # Lazy imports: every merge imports Replacement, but few merges need PEFT.
    from exporter.peft_modules.results import Results, ResultTensor
    from exporter.peft_modules.weights import module_places

    results = Results(checkpoint.path, adapter.path, process)
    changes = [edit for edit in adapter.edits if isinstance(edit, ByPeft)]
    in_out = adapter.config.get("fan_in_fan_out") is True
    computed = []
    for number, change in enumerate(changes):
        places = module_places(checkpoint, change, in_out=in_out)
        weight = ResultTensor.of(results, number, "weight", change, dtype, places.weight_shape)
        bias = None
        if change.bias and places.bias is not None:
            tensor = ResultTensor.of(results, number, "bias", change, dtype, places.bias.shape)
            bias = FullModule(change.path, change.key, change.module, "bias", tensor, in_place=False)
        computed.append(
            Replacement(
                change.path, change.key, change.module, "weight", weight, in_place=False, change=change, bias=bias
            )
        )
    return [*computed, *(edit for edit in adapter.edits if not isinstance(edit, ByPeft))]
