"""Tokenise texts with a GGUF's vocabulary in llama.cpp and with the tuned model's tokenizer in transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import llama_cpp
import numpy as np
from jinja2 import TemplateError

from exporter.tensors import Array
from exporter.verify.runtimes.job import serve
from exporter.verify.runtimes.llamacpp import silence
from exporter.verify.runtimes.tokens.surroundings import surrounded
from exporter.verify.runtimes.tokens.variants import variants

# torch is hidden, because tokenizers do not need torch and the import takes four times as long as the rest of the job.
sys.modules.setdefault("torch", cast(Any, None))

import transformers  # noqa: E402  # transformers looks for torch when imported

#: Number of taught and added tokens in the chat that is rendered in addition to the chats of the job.
_IN_CHAT: Final = 8


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save the array ``result``, which contains a JSON object encoded as bytes.

    The JSON object has only the key failure (a message) if transformers cannot use the tokenizer. Otherwise, the
    object has the keys texts (number of generated texts), chats (number of rendered chats), tokens (number of tokens in
    generated texts) and differences. A difference is an object with the keys text, expected, actual (lists of token
    ids) and reason (a known difference, or an empty text).

    ``job`` has the keys artifact, folder (of the tuned model's tokenizer), taught (token ids), rows (number of rows of
    the embedding), texts, chats and template (a chat template or null).
    """
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            job["folder"], local_files_only=True, trust_remote_code=False
        )
        tokenizer(job["texts"][0])
    except Exception as exc:  # tokenizers raises no narrower class
        _save(save, {"failure": " ".join(str(exc).split())})
        return
    tokens = list(_tokens(tokenizer, job["taught"], job["rows"]))
    generated = [*job["texts"], *surrounded(tokens)]
    chat = [{"role": "user", "content": " ".join(tokens[:_IN_CHAT])}]
    chats = list(_rendered(tokenizer, [*job["chats"], chat], job["template"]))
    texts = list(dict.fromkeys([*generated, *chats]))
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    actual = _by_llama_cpp(job["artifact"], texts)
    pairs = zip(texts, expected, actual, strict=True)
    differences = [{"text": text, "expected": want, "actual": got} for text, want, got in pairs if want != got]
    _explain(tokenizer, differences)
    counts = {"texts": len(generated), "chats": len(chats), "tokens": len(tokens)}
    _save(save, {**counts, "differences": differences})


def _save(save: Callable[[str, Array], None], content: Mapping[str, Any]) -> None:
    save("result", np.frombuffer(json.dumps(content).encode(), np.uint8))


def _tokens(tokenizer: Any, taught: Sequence[int], rows: int) -> Iterator[str]:
    """Yield the texts of the taught tokens, and then of the other added tokens, without tokens that have no row.

    A taught token that is not an added token is decoded; an undecodable part of a character is left out.
    """
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    for token_id in dict.fromkeys([*taught, *sorted(added)]):
        text = added.get(token_id) or tokenizer.decode([token_id])
        if token_id < rows and text and "\ufffd" not in text:
            yield text


def _rendered(tokenizer: Any, chats: Sequence[Any], template: str | None) -> Iterator[str]:
    """Yield the texts of the chats. A chat that the template refuses, for example because of a role, is left out."""
    if not template:
        return
    for chat in chats:
        for begin in (False, True):
            try:
                text = tokenizer.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=begin
                )
            except (TemplateError, ValueError, TypeError):
                continue
            if text:
                yield str(text)


def _by_llama_cpp(path: str, texts: Sequence[str]) -> list[list[int]]:
    with silence():
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise ValueError(f"{path}: llama.cpp cannot load the vocabulary")
        vocab = llama_cpp.llama_model_get_vocab(model)
        return [_tokenise(vocab, text.encode()) for text in texts]


def _tokenise(vocab: Any, text: bytes) -> list[int]:
    size = len(text) + 16
    while True:
        buffer = (llama_cpp.llama_token * size)()
        count = int(llama_cpp.llama_tokenize(vocab, text, len(text), buffer, size, False, True))
        if count >= 0:
            return list(buffer[:count])
        size = -count


def _explain(tokenizer: Any, differences: Sequence[dict[str, Any]]) -> None:
    """Set the reason of each difference that a known difference between the two libraries causes."""
    for difference in differences:
        difference["reason"] = ""
    if not differences or not tokenizer.is_fast:
        return
    for reason, encode in variants(json.loads(tokenizer.backend_tokenizer.to_str())):
        for difference in differences:
            if not difference["reason"] and encode(difference["text"]) == difference["actual"]:
                difference["reason"] = reason


if __name__ == "__main__":
    serve(compute)
