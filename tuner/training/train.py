"""Train token rows as a TuneSpec specifies, and write the adapter folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, set_seed

from exporter.errors import BadInput, TTExportError
from exporter.packages import package_versions
from exporter.sources.hf.full_precision import require_plain_rows
from tuner.inputs.base import Base, StoredTensor, load_base, open_base, quiet, stored_embedding
from tuner.inputs.data import Examples, read_examples, split_examples
from tuner.inputs.encode import Encoded, encode_examples
from tuner.inputs.vocab import add_tokens, embedding_rows, existing_token_id, llama_cpp_notes
from tuner.layers.switch import enable
from tuner.spec import TuneSpec
from tuner.training.adapt import adapt
from tuner.training.arguments import training_arguments
from tuner.training.folder import check_output, staged_adapter, write_adapter
from tuner.training.report import losses, write_curve, write_metrics
from tuner.training.trainer import OnStep, RowsTrainer
from tuner.training.work import claimed, last_checkpoint, start_or_resume, work_folder

__all__ = ["tune"]

OnNote = Callable[[str], None]

_PACKAGES: Final = ("ttexport", "accelerate", "datasets", "peft", "tokenizers", "torch", "transformers", "trl")


@dataclass(frozen=True, slots=True)
class _Data:
    """The examples of a training run in two forms: as read from the file, and encoded as token ids."""

    train: Examples
    evaluate: Examples | None
    encoded: Encoded
    held_out: Encoded | None


def tune(
    spec: TuneSpec, examples: Examples | None = None, *, on_step: OnStep | None = None, on_note: OnNote | None = None
) -> dict[str, Any]:
    """Run the training that ``spec`` specifies, and return the training record, extended by the path of the adapter.

    The training record is also written as train.json. examples: the examples in ``spec.data``, if the caller has
    already read the file. on_note: callback for notes to the user; without a callback, a download shows no progress.
    The folder ``spec.out`` is created only if the run succeeds. During the run, checkpoints are stored in the work
    folder next to ``spec.out``. Under torchrun or ``accelerate launch``, every process must call ``tune``. The first
    process writes the output, and every process returns after the output is written. Raises: for an invalid input, only
    errors whose classes are defined in ``exporter.errors``.
    """
    note = on_note or _ignore
    examples = read_examples(spec.data) if examples is None else examples
    held_out = read_examples(spec.eval_data) if spec.eval_data is not None else None
    if spec.eval_share is not None:
        examples, held_out = split_examples(examples, spec.eval_share, spec.seed)
    base = open_base(spec.base, quiet=on_note is None)
    require_plain_rows(base.checkpoint, updates=spec.lora_rank is not None, untie=False, names=[base.name])
    inputs = tuple(path for path in (base.folder, spec.data, spec.eval_data) if path is not None)
    check_output(spec.out, force=spec.force, inputs=inputs)
    model, tokenizer = load_base(base, spec.dtype)
    embedding = stored_embedding(base, model)
    # Existing tokens come first, because existing tokens are looked up in the base's own vocabulary.
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
    data = _encode(tokenizer, examples, held_out, spec)
    _note_data(tokens, data, spec, note)
    ends = model.generation_config.eos_token_id
    for line in llama_cpp_notes(tokenizer, [entry["id"] for entry in tokens], ends):
        note(f"in a GGUF: {line}")
    set_seed(spec.seed)  # a LoRA adapter starts with random factors
    tuned = adapt(model, base, [entry["id"] for entry in tokens], spec)
    record = {"tokens": tokens, **_record(spec, base, embedding, data)}
    # PEFT itself loads a checkpoint into the model, so our classes must be enabled during the loading.
    with claimed(work_folder(spec.out)), quiet(), enable():
        trainer = _trainer(tuned, tokenizer, data, spec, [entry["id"] for entry in tokens], on_step)
        record["processes"] = trainer.args.world_size
        state = _train(trainer, spec, _identity(spec, record), note)
        record["settings"]["steps"] = trainer.state.global_step
        record["losses"] = losses(trainer.state.log_history)
        if trainer.args.should_save:
            with staged_adapter(spec.out, force=spec.force, inputs=inputs) as folder:
                write_metrics(folder, trainer.state.log_history)
                write_curve(folder, trainer.state.log_history)
                write_adapter(folder, tuned, tokenizer, record, state)
            shutil.rmtree(work_folder(spec.out), ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    return {"adapter": str(spec.out), **record}


def _ignore(note: str) -> None:
    """Ignore a note."""


def _token_list(spec: TuneSpec, added: list[int], known: list[int]) -> list[dict[str, Any]]:
    seen: set[int] = set()
    for token, token_id in zip(spec.tokens, known, strict=True):
        if token_id in seen:
            raise BadInput(f"--token {token!r}: expected distinct tokens, found id {token_id} twice")
        seen.add(token_id)
    tokens = [{"token": token, "id": i, "new": True} for token, i in zip(spec.new_tokens, added, strict=True)]
    return tokens + [{"token": token, "id": i, "new": False} for token, i in zip(spec.tokens, known, strict=True)]


def _encode(tokenizer: PreTrainedTokenizerBase, examples: Examples, held_out: Examples | None, spec: TuneSpec) -> _Data:
    encoded = encode_examples(tokenizer, examples, spec.max_length)
    evaluated = None if held_out is None else encode_examples(tokenizer, held_out, spec.max_length)
    return _Data(examples, held_out, encoded, evaluated)


def _note_data(tokens: list[dict[str, Any]], data: _Data, spec: TuneSpec, note: OnNote) -> None:
    """Record how often each trained token occurs in the training data, and report problems of the training data.

    Trained tokens that do not occur, truncated examples and skipped examples are reported before the training starts.
    """
    encoded = data.encoded
    for entry in tokens:
        entry["occurrences"] = sum(example["input_ids"].count(entry["id"]) for example in encoded.examples)
        if not entry["occurrences"]:
            name = f"{entry['token']!r} (id {entry['id']})"
            note(f"{name} does not occur in the training data, so the model only learns not to predict this token")
    if encoded.truncated:
        total = len(data.train.examples)
        note(f"{encoded.truncated} of {total} examples were truncated to {spec.max_length} tokens (--max-length)")
    if encoded.dropped:
        lines = ", ".join(map(str, encoded.dropped[:5])) + (", …" if len(encoded.dropped) > 5 else "")
        note(
            f"{len(encoded.dropped)} examples were skipped, because no token of the examples contributes to the loss: "
            f"line {lines}"
        )


def _record(spec: TuneSpec, base: Base, embedding: StoredTensor, data: _Data) -> dict[str, Any]:
    record: dict[str, Any] = {
        "base": base.name,
        "base_tensor": {"name": embedding.name, "dtype": embedding.dtype, "shape": list(embedding.shape)},
        "base_digest": embedding.digest,
        "data": spec.data.name,
        "data_digest": data.train.digest,
        "kind": data.train.example_type,
        "examples": len(data.encoded.examples),
    }
    if data.evaluate is not None and data.held_out is not None:
        record |= {"eval_digest": data.evaluate.digest, "eval_examples": len(data.held_out.examples)}
    settings = {name: value for name, value in spec.settings().items() if name not in ("new_tokens", "tokens")}
    versions = {name: version for name, version in package_versions(_PACKAGES).items() if version}
    return record | {"settings": settings, "seed": spec.seed, "versions": versions}


def _trainer(
    tuned: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: _Data,
    spec: TuneSpec,
    token_ids: list[int],
    on_step: OnStep | None,
) -> RowsTrainer:
    tokenizer = copy.deepcopy(tokenizer)  # TRL sets a padding token, which the saved tokenizer must not get
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(
            0
        )  # padding is masked, so any token can be the padding token
    disable_progress_bar()
    callbacks: list[Any] = []
    if spec.patience is not None:
        callbacks.append(EarlyStoppingCallback(spec.patience))
    if spec.tensorboard is not None:
        callbacks.append(_tensorboard(spec.tensorboard))
    return RowsTrainer(
        model=tuned,
        token_ids=token_ids,
        on_step=on_step,
        args=training_arguments(spec, len(data.encoded.examples)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(data.encoded.examples),
        eval_dataset=None if data.held_out is None else Dataset.from_list(data.held_out.examples),
        callbacks=callbacks,
    )


def _tensorboard(folder: Path) -> Any:
    from tensorboardX import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))


def _train(trainer: RowsTrainer, spec: TuneSpec, run: dict[str, Any], note: OnNote) -> dict[str, torch.Tensor]:
    """Train from the first step or, with ``--resume``, from the last checkpoint, and return the trained parameters.

    run: the settings and digests that identify the run; the run of the checkpoint must have equal values.
    """
    arguments = trainer.args
    work = work_folder(spec.out)
    checkpoint: Path | None = None
    with arguments.main_process_first(local=False):
        if arguments.should_save:
            checkpoint = start_or_resume(work, run, resume=spec.resume, force=spec.force)
        elif spec.resume:
            checkpoint = last_checkpoint(work)
    if checkpoint is not None:
        note(f"resuming the training after step {checkpoint.name.rpartition('-')[2]}")
        arguments.eval_on_start = False
    elif spec.resume:
        note("--resume: found no checkpoint, so the training starts from the beginning")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not trainer.is_fsdp_enabled:
        note("found no accelerator, so accelerate cannot shard the model and every process loads the whole model")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if spec.evaluates and _is_stale(trainer):
        trainer.evaluate()
    state = trainer.trained_state()
    if any(not torch.isfinite(tensor).all() for tensor in state.values()):
        raise TTExportError("the trained rows contain NaN or infinity; try a lower --lr")
    return state


def _is_stale(trainer: RowsTrainer) -> bool:
    """Whether the model's trained rows may have changed since the last evaluation."""
    if trainer.args.load_best_model_at_end:
        return True
    return not any(
        "eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
    )


def _identity(spec: TuneSpec, record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings and digests that must be equal in an interrupted run and the run that resumes it."""
    names = ("base_digest", "data_digest", "eval_digest", "processes")
    run = {**{name: record.get(name) for name in names}, **spec.settings()}
    return dict(json.loads(json.dumps(run)))
