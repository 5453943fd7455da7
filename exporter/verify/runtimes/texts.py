"""Tokenizers in transformers: what they make of texts, of tokens and of chats, each from its folder on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError

from exporter.tensors import Array
from exporter.verify.runtimes.job import serve

# Tokenizers compute nothing with torch, whose import takes four times as long as all else that is done here: as if it
# were not installed.
sys.modules.setdefault("torch", cast(Any, None))

import transformers  # noqa: E402  # it looks for torch when it is loaded


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Job: folders (name → folder), ids (sequences), texts, chats, templates (name → template of some other file).

    Saves per name a JSON object as bytes: ``encoded``, ``decoded``, ``plain`` (decoded, spaces as
    they are), ``chats``, or ``failure``. Templates are rendered
    with the tokenizer of the folder named ``tuned``.
    """
    transformers.logging.set_verbosity_error()
    for name, folder in job["folders"].items():
        save(name, _bytes(_use(folder, job)))
    for name, template in job["templates"].items():
        save(name, _bytes({"chats": _render(_load(job["folders"]["tuned"]), job["chats"], template)}))


def _use(folder: str, job: Mapping[str, Any]) -> dict[str, Any]:
    try:
        tokenizer = _load(folder)
        return {
            "encoded": [tokenizer(text)["input_ids"] for text in job["texts"]],
            "decoded": [tokenizer.decode(ids) for ids in job["ids"]],
            "plain": [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in job["ids"]],
            "chats": _render(tokenizer, job["chats"], None) if tokenizer.chat_template else [],
        }
    except Exception as exc:  # tokenizers raises nothing more particular; the other folders have to be looked at
        return {"failure": " ".join(str(exc).split())}


def _load(folder: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _render(tokenizer: Any, chats: Sequence[Any], template: str | None) -> list[str]:
    """Every chat with and without the beginning of an answer; a template may refuse a role, which is an answer, too."""
    out = []
    for chat in chats:
        for begin in (False, True):
            try:
                text = tokenizer.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=begin
                )
            except (TemplateError, ValueError, TypeError) as exc:
                text = f"{type(exc).__name__}: {exc}"
            out.append(text)
    return out


def _bytes(found: Mapping[str, Any]) -> Array:
    return np.frombuffer(json.dumps(found).encode(), np.uint8)


if __name__ == "__main__":
    serve(compute)
