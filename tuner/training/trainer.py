"""Extend TRL's SFTTrainer to use the model's own head, log the loss of trained tokens, and save only the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer
from trl.trainer.sft_trainer import SFTTrainer

from exporter.errors import TTExportError
from tuner.training.work import mark_complete

__all__ = ["OnStep", "RowsTrainer"]

# (step, number of steps of the whole run, loss of the step)
OnStep = Callable[[int, int, float], None]


class RowsTrainer(SFTTrainer):
    """An SFTTrainer for models with trained rows in the output head.

    SFTTrainer itself multiplies hidden states with ``lm_head.weight``. The product with ``lm_head.weight`` ignores
    trained rows of the head, so SFTTrainer rejects adapters on the head. With RowsTrainer, the model itself computes
    the logits and the loss, and memory contains only one copy of the logits. Every log entry also contains
    ``taught_loss``, the mean loss over the labels that are trained tokens, unless a step has no such label.
    """

    def __init__(self, *, model: Any, token_ids: Sequence[int], on_step: OnStep | None = None, **kwargs: Any) -> None:
        """Create the trainer.

        model: a PeftModel. token_ids: ids of the trained tokens. kwargs: arguments of SFTTrainer.
        """
        with _without_fused_head(model):
            super().__init__(model=model, **kwargs)
        self.remove_callback(PrinterCallback)
        self._token_ids = torch.tensor(list(token_ids), device=self.accelerator.device)
        self._on_step = on_step
        self._taught: dict[str, list[Tensor]] = {"train": [], "eval": []}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss that the model computes: the mean over all labels of the step in all processes."""
        labels = inputs["labels"]
        loss, outputs = Trainer.compute_loss(
            self, model, {**inputs, "use_cache": False}, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self._taught["train" if model.training else "eval"].append(self._taught_sum(outputs["logits"], labels))
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _taught_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return a tensor (2,) with the summed loss and the number of the labels that are trained tokens.

        Peak memory: a copy of the logits at the positions of labels that are trained tokens.
        """
        hit = torch.isin(labels[:, 1:], self._token_ids)
        chosen = logits[:, :-1][hit].float()
        return torch.stack([F.cross_entropy(chosen, labels[:, 1:][hit], reduction="sum"), hit.sum()]).double()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss of the trained tokens to the log of a step or an evaluation.

        Raises: TTExportError if the loss is NaN or infinity.
        """
        for mode, key, name in (("train", "loss", "taught_loss"), ("eval", "eval_loss", "eval_taught_loss")):
            if key in logs:
                if not math.isfinite(logs[key]):
                    raise TTExportError(f"the loss of step {self.state.global_step} is {logs[key]}; try a lower --lr")
                total = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
                total = self.accelerator.reduce(sum(self._taught[mode], total), reduction="sum")
                self._taught[mode].clear()
                if total[1]:
                    logs[name] = (total[0] / total[1]).item()
        super().log(logs, start_time)
        if self._on_step is not None and "loss" in logs and self.is_world_process_zero():
            self._on_step(self.state.global_step, self.state.max_steps, logs["loss"])

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trained parameters by name, unsharded and on the CPU.

        Only the first process is guaranteed to get all parameters. Every process must call ``trained_state``, because
        sharded parameters are gathered from all processes. Frozen parameters are not gathered from the processes.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return cast(dict[str, Tensor], get_model_state_dict(self.model_wrapped, options=options))

    # --- checkpoints: the adapter, optimizer, scheduler, random states and position, written by transformers ----------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter without the embedding matrix.

        PEFT would save the embedding matrix too if the vocabulary grew.
        """
        if self.args.should_save:
            model = cast(PeftModel, self.model)
            model.save_pretrained(str(output_dir), state_dict=state_dict, save_embedding_layers=False)
            (Path(str(output_dir)) / "README.md").unlink(
                missing_ok=True
            )  # PEFT writes an empty template of a model card

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        self.accelerator.wait_for_everyone()  # the other processes are still writing random states
        if self.args.should_save:
            mark_complete(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: no model card is written, because users write their own cards."""

    def _send_telemetry(self) -> None:
        """Send no telemetry."""


@contextmanager
def _without_fused_head(model: Any) -> Iterator[None]:
    """Hide the head from SFTTrainer's constructor.

    At the end of the block, restore the model's ``forward``, which the constructor replaced.
    """
    base = model.get_base_model()
    model.get_output_embeddings = _nothing  # hides the method of the base model, to which a PeftModel delegates
    try:
        yield
    finally:
        del model.get_output_embeddings
        vars(base).pop("forward", None)


def _nothing() -> None:
    return None
