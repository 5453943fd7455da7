"""Use transformers to encode texts, decode tokens and render chats with the tokenizers in folders on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError

from exporter.tensors import Array
from exporter.verify.expect.templates import stored_name
from exporter.verify.runtimes.job import serve

# torch is hidden, because tokenizers do not need torch and the import takes four times as long as the rest of the job.
sys.modules.setdefault("torch", cast(Any, None))

import transformers  # noqa: E402  # transformers looks for torch when imported


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save one array per folder and per template, which contains a JSON object encoded as bytes.

    The JSON object of a folder has the keys encoded, decoded, plain and chats, or only the key failure (an error
    message). The JSON object of a template has only the key chats.

    ``job`` has the keys folders (name → folder), folder templates (name → chat templates, or None for the templates
    that transformers finds in the folder), ids (token sequences to decode), texts, chats and templates (name → chat
    templates read from a file). Chat templates are dicts from template name to text. The chat templates in
    ``templates`` are rendered with the tokenizer of the folder named ``tuned``. The value of ``plain`` is the list of
    texts decoded with clean_up_tokenization_spaces=False.
    """
    transformers.logging.set_verbosity_error()
    for name, folder in job["folders"].items():
        save(name, _bytes(_use(folder, job, job["folder templates"][name])))
    for name, templates in job["templates"].items():
        save(name, _bytes({"chats": _render(_load(job["folders"]["tuned"]), job["chats"], templates)}))


def _use(folder: str, job: Mapping[str, Any], templates: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        tokenizer = _load(folder)
        return {
            "encoded": [tokenizer(text)["input_ids"] for text in job["texts"]],
            "decoded": [tokenizer.decode(ids) for ids in job["ids"]],
            "plain": _decode(tokenizer, job["ids"]),
            "chats": _render(tokenizer, job["chats"], _own(tokenizer) if templates is None else templates),
        }
    except Exception as exc:  # tokenizers raises no narrower class, and all folders must run
        return {"failure": " ".join(str(exc).split())}


def _decode(tokenizer: Any, sequences: Sequence[Sequence[int]]) -> list[str]:
    """Decode token sequences without cleaning up spaces.

    The decoder of a byte-level BPE reads a letter such as "ä" in an added token as the symbol of a byte, and returns
    "na\ufffdve" for the added token "naïve". The function returns "naïve" for such a token.
    """
    model = tokenizer.backend_tokenizer.model
    misread = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if not token.content.isascii()
        and model.token_to_id(token.content) is None
        and "\ufffd" in tokenizer.decode([token_id])
    }
    out = []
    for ids in sequences:
        parts, first = [], 0
        for number, token_id in enumerate(ids):
            if token_id in misread:
                parts += [ids[first:number], misread[token_id]]
                first = number + 1
        parts.append(ids[first:])
        texts = [
            part if isinstance(part, str) else tokenizer.decode(part, clean_up_tokenization_spaces=False)
            for part in parts
        ]
        out.append("".join(texts))
    return out


def _load(folder: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _own(tokenizer: Any) -> dict[str, str]:
    """Return the tokenizer's chat templates as a dict from name to text."""
    own = tokenizer.chat_template
    return own if isinstance(own, dict) else {"default": own} if own else {}


def _render(tokenizer: Any, chats: Sequence[Any], templates: Mapping[str, str]) -> list[str]:
    """Render every chat twice with each chat template: without and with a generation prompt.

    The order of the results is the order of the names of the templates in a GGUF. An empty template has no result. If
    the chat template raises an error, for example because of a role, the result contains the error message.
    """
    out = []
    texts = [text for _, text in sorted((stored_name(name), text) for name, text in templates.items()) if text]
    for template, chat in product(texts, chats):
        for begin in (False, True):
            try:
                text = tokenizer.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=begin
                )
            except (TemplateError, ValueError, TypeError) as exc:
                text = f"{type(exc).__name__}: {exc}"
            out.append(text)
    return out


def _bytes(content: Mapping[str, Any]) -> Array:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


if __name__ == "__main__":
    serve(compute)
