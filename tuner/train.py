"""A training run from specification to adapter folder."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from exporter.errors import BadInput, TTExportError, UsageError
from tuner.base import Base, load_base, open_base, stored_embedding
from tuner.config import TrainableTokensConfig
from tuner.data import Texts, encode_texts, read_texts
from tuner.enable import get_peft_model
from tuner.folder import staged, write_adapter
from tuner.spec import DEFAULT_EPOCHS, TuneSpec
from tuner.tying import output_embedding, tied_module_names
from tuner.vocab import add_tokens, embedding_rows, existing_token_id

__all__ = ["collate", "tune"]

# (step, steps of the whole run, loss of the step)
OnStep = Callable[[int, int, float], None]
OnNote = Callable[[str], None]

_PACKAGES: Final = ("ttexport", "torch", "transformers", "peft", "tokenizers")
_NO_LOSS: Final = -100  # the label that torch's cross entropy leaves out


def tune(
    spec: TuneSpec, texts: Texts | None = None, *, on_step: OnStep | None = None, on_note: OnNote | None = None
) -> dict[str, Any]:
    """Run ``spec`` and return the record that is also written as train.json, with the adapter's path.

    texts: what ``spec.data`` holds, if it was read already.
    Nothing is left at ``spec.out`` unless all went well. Raises: errors of ``exporter.errors`` only, for bad input.
    """
    texts = read_texts(spec.data) if texts is None else texts
    base = open_base(spec.base)
    with staged(spec.out, force=spec.force, inputs=(base.folder, spec.data)) as folder:
        model, tokenizer = load_base(base, spec.dtype)
        embedding = stored_embedding(base, model)
        # Known tokens first: they are looked up in the vocabulary as the base has it.
        known = [existing_token_id(tokenizer, token, embedding_rows(model)) for token in spec.tokens]
        added = add_tokens(
            model,
            tokenizer,
            spec.new_tokens,
            special=spec.special,
            init=spec.init,
            descriptions=spec.descriptions,
            seed=spec.seed,
        )
        tokens = _token_list(spec, added, known)
        encoded, cut = encode_texts(tokenizer, texts.texts, spec.max_length)
        _note_data(tokens, encoded, cut, spec, on_note or _ignore)
        tuned = _wrap(model, base, tokens, spec)
        losses = _run(tuned, encoded, spec, tokenizer.pad_token_id or 0, on_step)
        record = {
            "tokens": tokens,
            "base": base.given,
            "base_tensor": {"name": embedding.name, "dtype": embedding.dtype, "shape": list(embedding.shape)},
            "base_digest": embedding.digest,
            **_record(spec, texts, losses),
        }
        write_adapter(folder, tuned, tokenizer, record)
    return {"adapter": str(spec.out), **record}


def _ignore(note: str) -> None:
    """Take a note that nobody asked for."""


def _token_list(spec: TuneSpec, added: list[int], known: list[int]) -> list[dict[str, Any]]:
    seen: set[int] = set()
    for token, token_id in zip(spec.tokens, known, strict=True):
        if token_id in seen:
            raise BadInput(f"--token {token!r}: expected distinct tokens, found id {token_id} twice")
        seen.add(token_id)
    tokens = [{"token": token, "id": i, "new": True} for token, i in zip(spec.new_tokens, added, strict=True)]
    return tokens + [{"token": token, "id": i, "new": False} for token, i in zip(spec.tokens, known, strict=True)]


def _note_data(tokens: list[dict[str, Any]], encoded: list[list[int]], cut: int, spec: TuneSpec, note: OnNote) -> None:
    """Count the tokens in the data (kept in the record), and say what a user will want to know before waiting."""
    for entry in tokens:
        entry["occurrences"] = sum(ids.count(entry["id"]) for ids in encoded)
        if not entry["occurrences"]:
            note(f"{entry['token']!r} (id {entry['id']}) does not occur in the data: its row learns only to be avoided")
    if cut:
        note(f"{cut} of {len(encoded)} texts were cut to {spec.max_length} tokens (--max-length)")


def _wrap(model: PreTrainedModel, base: Base, tokens: list[dict[str, Any]], spec: TuneSpec) -> Any:
    """Return the model as a PeftModel with rows for ``tokens``, in the head too if it is untied."""
    untied = output_embedding(model) is not None and not tied_module_names(model)
    if untied and spec.train_head is False and spec.new_tokens:
        raise UsageError("--no-train-head: the base has an untied head, which needs rows for the new tokens too")
    config = TrainableTokensConfig(
        token_indices=[entry["id"] for entry in tokens],
        task_type="CAUSAL_LM",
        train_head=untied and spec.train_head is not False,
    )
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = base.given
    return tuned


def collate(batch: Sequence[dict[str, list[int]]], padding_id: int) -> dict[str, Tensor]:
    """Return a right-padded batch: input_ids, attention_mask and labels, each (batch, longest) int64."""
    longest = max(len(example["input_ids"]) for example in batch)
    ids = torch.full((len(batch), longest), padding_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, _NO_LOSS)
    for row, example in enumerate(batch):
        tokens = torch.tensor(example["input_ids"], dtype=torch.int64)
        ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _Rows(Trainer):
    """Trainer that keeps every step's loss and reports it; nothing is logged or printed elsewhere."""

    def __init__(self, *args: Any, on_step: OnStep | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.losses: list[float] = []
        self._on_step = on_step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        value = loss.item()
        if not math.isfinite(value):
            raise TTExportError(f"the loss of step {len(self.losses) + 1} is {value}; a lower --lr may help")
        self.losses.append(value)
        if self._on_step is not None:
            self._on_step(len(self.losses), self.state.max_steps, value)
        return loss


def _run(model: Any, encoded: list[list[int]], spec: TuneSpec, padding_id: int, on_step: OnStep | None) -> list[float]:
    """Train and return the loss of every step. AdamW sees only what requires a gradient: the rows."""
    with tempfile.TemporaryDirectory(prefix="ttexport-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=spec.batch_size,
            max_steps=spec.steps if spec.steps is not None else -1,
            num_train_epochs=spec.epochs if spec.epochs is not None else DEFAULT_EPOCHS,
            learning_rate=spec.lr,
            weight_decay=0.0,  # decay would pull rows to zero, and the base's rows are not there
            seed=spec.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = _Rows(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": ids} for ids in encoded],
            data_collator=partial(collate, padding_id=padding_id),
            on_step=on_step,
        )
        trainer.train()
    return trainer.losses


def _record(spec: TuneSpec, texts: Texts, losses: list[float]) -> dict[str, Any]:
    return {
        "data": spec.data.name,
        "data_digest": texts.digest,
        "examples": len(texts.texts),
        "settings": {
            "seed": spec.seed,
            "lr": spec.lr,
            "steps": len(losses),
            "batch_size": spec.batch_size,
            "max_length": spec.max_length,
            "init": spec.init,
            "dtype": spec.dtype,
        },
        "seed": spec.seed,
        "losses": {"first": losses[0], "last": losses[-1]},
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # ttexport itself, when run from its source folder
