"""Check tokenizers and chat templates by encoding texts, decoding tokens and rendering chats.

Separate checks in ``exporter.verify`` compare the contents of tokenizer files and chat templates. The checks in this
module apply each artifact's tokenizer and chat template to texts and chats, as applications do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.hf.checkpoint import auxiliary_files
from exporter.sources.hf.tokenizer import added_tokens
from exporter.verify.expect.reference import Reference
from exporter.verify.expect.templates import is_of_processor, templates
from exporter.verify.report import Check, Skip
from exporter.verify.running.prompts import Sequences
from exporter.verify.runtimes.installed import installed
from exporter.verify.runtimes.job import RuntimeFailed, run

#: Three chats: one turn, one turn after a system message, and a dialogue with characters to escape.
CHATS: Final = (
    [{"role": "user", "content": "How many ships sail tonight?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Fog or <b>rain</b>?"}],
    [
        {"role": "user", "content": 'Say "yes".\n\n  Twice.'},
        {"role": "assistant", "content": "yes yes"},
        {"role": "user", "content": "Très bien 今日"},
    ],
)


@dataclass(frozen=True)
class TextResults:
    """Encoded texts, decoded tokens and rendered chats of the tuned model and of all artifacts.

    outputs: name in the job → results of a tokenizer and its chat template; the tuned model has the name "tuned". ids:
    the token sequences to decode. names: path of an artifact → name of the artifact in the job. reason: the reason why
    the process failed, or "" if the process succeeded.
    """

    outputs: Mapping[str, Mapping[str, Any]]
    ids: Sequence[Sequence[int]]
    names: Mapping[Path, str]
    reason: str = ""

    def check(self, path: Path) -> Iterator[Check | Skip]:
        """Yield the tokenizer and chat-template checks of the artifact at ``path``."""
        want = self.outputs.get("tuned", {"failure": self.reason})
        if "failure" in want:
            yield Skip("texts", f"transformers cannot load the tuned model's tokenizer: {want['failure']}")
            return
        got = self.outputs.get(self.names[path])
        if got is None:
            yield Skip("texts", "the folder of the model file contains no tokenizer")
            return
        if "failure" in got:
            yield Check(
                name="encoding",
                passed=False,
                detail=f"transformers cannot load the artifact's tokenizer: {got['failure']}",
            )
            return
        if "encoded" in got:
            yield _compare("encoding", want["encoded"], got["encoded"], "texts")
            yield _compare("decoding", want["decoded"], got["decoded"], "sequences of tokens")
        if want["chats"]:
            yield _compare("rendered chats", want["chats"], got["chats"], "chats")


def run_texts(formats: Mapping[Path, str], reference: Reference, sequences: Sequences, folder: Path) -> TextResults:
    """Apply the tokenizers and chat templates of folders, and the chat templates of GGUF files, in one process.

    formats: path of an artifact → name of its format. An ONNX artifact that is a single model file is skipped, because
    the artifact has no tokenizer and no chat template.
    """
    staged = folder / "tuned"
    staged.mkdir(parents=True)
    for name, path in {**reference.auxiliary_files, "config.json": reference.checkpoint.path / "config.json"}.items():
        (staged / name).parent.mkdir(exist_ok=True)
        (staged / name).symlink_to(path.resolve())
    ids = _sequences(reference, sequences)
    names = {path: f"artifact.{number}" for number, path in enumerate(formats)}
    stored = {path: _templates(path) for path, format_name in formats.items() if format_name == "gguf"}
    folders = {path: auxiliary_files(path) for path in formats if _has_files(path)}
    job: dict[str, Any] = {
        "folders": {"tuned": str(staged)} | {names[path]: str(path) for path in folders},
        "folder templates": {
            "tuned": _unlike_tokenizer(reference.auxiliary_files, reference.templates),
            **{names[path]: _unlike_tokenizer(files, templates(files)) for path, files in folders.items()},
        },
        "templates": {names[path]: texts for path, texts in stored.items() if texts},
        "texts": sequences.texts,
        "ids": ids,
        "chats": CHATS,
    }
    try:
        result = run("texts", job, folder / "texts")
    except RuntimeFailed as exc:
        return TextResults({}, ids, names, str(exc))
    outputs = {name: json.loads(result(name).tobytes()) for name in (*job["folders"], *job["templates"])}
    no_template: dict[str, Any] = {"chats": []}
    return TextResults({**{names[path]: no_template for path in stored}, **outputs}, ids, names)


def check_token_texts(path: Path, results: TextResults, folder: Path) -> Iterator[Check]:
    """Check that llama.cpp and the tuned model's tokenizer decode tokens to the same texts, ignoring a leading space.

    If llama.cpp is not installed or transformers cannot load the tuned model's tokenizer, no check is yielded, because
    other checks report the reason.
    """
    want = results.outputs.get("tuned", {}).get("plain")
    if want is None or not installed("llama.cpp"):
        return
    try:
        result = run("token_texts", {"artifact": str(path), "ids": results.ids}, folder)
    except RuntimeFailed as exc:
        yield Check(name="decoding", passed=False, detail=str(exc))
        return
    got = [result(f"text.{number}").tobytes().decode("utf-8", "replace") for number in range(len(want))]
    plain = [text.removeprefix(" ") for text in want], [text.removeprefix(" ") for text in got]
    yield _compare("decoding", *plain, "sequences of tokens")


def _sequences(reference: Reference, sequences: Sequences) -> list[list[int]]:
    """Return the token sequences to decode: all texts, and each added or trained token as a separate sequence."""
    path = reference.tokenizer_file()
    single = {*(added_tokens(path).values() if path else ()), *sequences.covered}
    return [*sequences.text_ids, *([token] for token in sorted(single))]


def _has_files(path: Path) -> bool:
    """Whether the folder contains a config or an auxiliary file, so that a missing tokenizer is a fault."""
    return path.is_dir() and ((path / "config.json").is_file() or bool(auxiliary_files(path)))


def _templates(path: Path) -> dict[str, str]:
    """Return the chat templates of a GGUF: a dict from name to text."""
    key = "tokenizer.chat_template"
    values = {name: value for name, value in GgufModel.open(path).metadata.items() if isinstance(value, str)}
    return {
        name.removeprefix(key).removeprefix(".") or "default": value
        for name, value in values.items()
        if name == key or name.startswith(f"{key}.")
    }


def _unlike_tokenizer(files: Mapping[str, Path], wanted: Mapping[str, str]) -> Mapping[str, str] | None:
    """Return ``wanted``, or None if transformers takes the templates ``wanted`` for the tokenizer by itself.

    A model's processor may have other templates than the tokenizer, and a processor needs libraries for images.
    """
    of_tokenizer = {name: path for name, path in files.items() if not is_of_processor(name)}
    return None if templates(of_tokenizer) == wanted else wanted


def _compare(name: str, want: Sequence[Any], got: Sequence[Any], unit: str) -> Check:
    wrong = [number for number, (expected, actual) in enumerate(zip(want, got, strict=False)) if expected != actual]
    if len(want) != len(got):
        wrong.append(min(len(want), len(got)))
    detail = f"the results for {len(want)} {unit} equal the tuned model's results"
    if wrong:
        expected, actual = (str(side[wrong[0]]) if wrong[0] < len(side) else "nothing" for side in (want, got))
        start = next((index for index, pair in enumerate(zip(expected, actual, strict=False)) if pair[0] != pair[1]), 0)
        begin = max(0, start - 10)
        shown = slice(begin, begin + 40)
        detail = f"item {wrong[0]} of the {unit}: expected {expected[shown]!r}, found {actual[shown]!r}"
    return Check(name=name, passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
