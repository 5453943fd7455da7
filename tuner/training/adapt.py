"""Create the PeftModel of a training run, with trainable token rows and optionally a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from exporter.errors import BadInput, UsageError
from tuner.inputs.base import Base
from tuner.layers.config import TrainableTokensConfig
from tuner.layers.switch import get_peft_model
from tuner.layers.tying import further_embedding, input_embedding, output_embedding, tied_module_names
from tuner.spec import TuneSpec

__all__ = ["adapt"]


def adapt(model: PreTrainedModel, base: Base, token_ids: Sequence[int], spec: TuneSpec) -> Any:
    """Return ``model`` as a PeftModel with trainable rows for ``token_ids``.

    An untied head also gets trainable rows, unless ``spec.train_head`` is False.

    The adapter's config records the name and revision of the base. Raises: UsageError if new tokens would have no
    trained rows in an untied head, BadInput if ``lora_targets`` match no module.
    """
    untied = output_embedding(model) is not None and not tied_module_names(model)
    if untied and spec.train_head is False and spec.new_tokens:
        raise UsageError(
            "--no-train-head: remove this option, because new tokens also need rows in the base's untied head"
        )
    train_head = untied and spec.train_head is not False
    config: Any = TrainableTokensConfig(token_indices=list(token_ids), task_type="CAUSAL_LM", train_head=train_head)
    if spec.lora_rank is not None:
        config = _lora(model, token_ids, spec, train_head=train_head)
    try:
        tuned = get_peft_model(model, config)
    except ValueError as exc:
        if spec.lora_rank is None:
            raise
        raise BadInput(f"--lora-targets: {' '.join(str(exc).split())}") from exc
    adapter_config = tuned.peft_config["default"]
    adapter_config.base_model_name_or_path = base.name
    adapter_config.revision = base.revision
    return tuned


def _lora(model: PreTrainedModel, token_ids: Sequence[int], spec: TuneSpec, *, train_head: bool) -> LoraConfig:
    """Return a LoRA configuration that also trains the token rows.

    The configuration does not list a tied head, because PEFT finds tied heads by itself.
    """
    assert spec.lora_rank is not None
    modules = [input_embedding(model), output_embedding(model) if train_head else None, further_embedding(model)]
    names = [name for module in modules if module is not None for name in _names(model, module)]
    targets: Any = list(spec.lora_targets) or None
    return LoraConfig(
        r=spec.lora_rank,
        lora_alpha=2 * spec.lora_rank,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        trainable_token_indices={name: list(token_ids) for name in names},
        task_type="CAUSAL_LM",
    )


def _names(model: nn.Module, module: nn.Module) -> list[str]:
    """Return a list that contains only the last part of the dotted name of ``module``.

    An adapter's config identifies target modules by the last part of their names.
    """
    return [name.rpartition(".")[2] for name, other in model.named_modules() if other is module]
