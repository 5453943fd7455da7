"""Build the training arguments of transformers and TRL from a TuneSpec."""

from __future__ import annotations

import math
from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig

from tuner.spec import DEFAULT_EPOCHS, SCHEDULES, TuneSpec
from tuner.training.work import work_folder

__all__ = ["training_arguments"]


def training_arguments(spec: TuneSpec, examples: int) -> SFTConfig:
    """Return the training arguments for a run with ``examples`` training examples.

    All reporting integrations of transformers are disabled. Creating the arguments joins the torch process group if a
    launcher such as torchrun started the process.
    """
    arguments = SFTConfig(
        output_dir=str(work_folder(spec.out)),
        use_cpu=not torch.accelerator.is_available(),
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.accumulate,
        max_steps=spec.steps if spec.steps is not None else -1,
        num_train_epochs=spec.epochs if spec.epochs is not None else DEFAULT_EPOCHS,
        learning_rate=spec.lr,
        lr_scheduler_type=SCHEDULES[spec.schedule],
        warmup_steps=spec.warmup,
        weight_decay=0.0,  # weight decay would pull rows to zero instead of to the base's rows
        bf16=spec.bf16,
        activation_checkpointing=spec.gradient_checkpointing,
        seed=spec.seed,
        max_length=None,  # encode_examples has already truncated and counted the examples
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        prediction_loss_only=True,
        save_total_limit=2,  # the newer checkpoint may be half written when the process is killed
        ddp_find_unused_parameters=False,  # every row is part of every step
        dataloader_pin_memory=torch.accelerator.is_available(),
        **_schedule(spec),
    )
    if spec.evaluates and spec.eval_every is None:
        epoch = math.ceil(math.ceil(examples / (spec.batch_size * arguments.world_size)) / spec.accumulate)
        arguments.eval_steps = epoch
        if spec.save_every is None:
            arguments.save_steps = epoch
    return arguments


def _schedule(spec: TuneSpec) -> dict[str, Any]:
    """Return the training arguments that determine when evaluations run and when checkpoints are written.

    "Once per epoch" is converted to a number of steps, because at the end of an epoch transformers would evaluate only
    after writing the checkpoint of the last step. A run that resumes from a checkpoint written before an evaluation
    would skip this evaluation.
    """
    return {
        "eval_strategy": "steps" if spec.evaluates else "no",
        "eval_steps": spec.eval_every or 1,
        "eval_on_start": spec.evaluates,
        "save_strategy": "steps" if spec.saves else "no",
        "save_steps": spec.save_every or spec.eval_every or 1,
        "load_best_model_at_end": spec.patience is not None,
        "metric_for_best_model": "eval_loss" if spec.patience is not None else None,
        "greater_is_better": False if spec.patience is not None else None,
    }
