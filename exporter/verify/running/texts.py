"""Checks of texts, in runtimes: tokens of a text, the text of tokens, and what a chat becomes.

Files were compared before; here each artifact's tokenizer and template do their work, as their users see it.
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
from exporter.verify.report import Check, Skip
from exporter.verify.running.prompts import Sequences
from exporter.verify.runtimes.installed import installed
from exporter.verify.runtimes.job import RuntimeFailed, run

#: One turn, a system's word before it, and a dialogue with something to escape.
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
    """What the tuned model's tokenizer and templates gave, and each artifact's; by the names of the job."""

    found: Mapping[str, Mapping[str, Any]]
    ids: Sequence[Sequence[int]]
    names: Mapping[Path, str]
    reason: str = ""

    def judge(self, path: Path) -> Iterator[Check | Skip]:
        """The checks of the artifact at ``path``."""
        want = self.found.get("tuned", {"failure": self.reason})
        if "failure" in want:
            yield Skip("texts", f"transformers cannot use the tuned model's tokenizer: {want['failure']}")
            return
        got = self.found.get(self.names[path])
        if got is None:
            yield Skip("texts", "the model file stands alone: there is no tokenizer beside it")
            return
        if "failure" in got:
            yield Check(name="encoding", passed=False, detail=f"transformers cannot use it: {got['failure']}")
            return
        if "encoded" in got:
            yield _compare("encoding", want["encoded"], got["encoded"], "texts")
            yield _compare("decoding", want["decoded"], got["decoded"], "sequences of tokens")
        if want["chats"]:
            yield _compare("rendered chats", want["chats"], got["chats"], "chats")


def run_texts(formats: Mapping[Path, str], reference: Reference, sequences: Sequences, folder: Path) -> TextResults:
    """One process for all: folders with their own tokenizer, GGUF files with their own template.

    formats: artifact → format; an ONNX model alone, in a folder or not, has neither.
    """
    staged = folder / "tuned"
    staged.mkdir(parents=True)
    for name, path in {**reference.auxiliary_files, "config.json": reference.checkpoint.path / "config.json"}.items():
        (staged / name).parent.mkdir(exist_ok=True)
        (staged / name).symlink_to(path.resolve())
    ids = _sequences(reference, sequences)
    names = {path: f"artifact.{number}" for number, path in enumerate(formats)}
    template = {path: _template(path) for path, kind in formats.items() if kind == "gguf"}
    job: dict[str, Any] = {
        "folders": {"tuned": str(staged)} | {names[path]: str(path) for path in formats if _has_files(path)},
        "templates": {names[path]: text for path, text in template.items() if text},
        "texts": sequences.texts,
        "ids": ids,
        "chats": CHATS,
    }
    try:
        result = run("texts", job, folder / "texts")
    except RuntimeFailed as exc:
        return TextResults({}, ids, names, str(exc))
    found = {name: json.loads(result(name).tobytes()) for name in (*job["folders"], *job["templates"])}
    silent: dict[str, Any] = {"chats": []}
    return TextResults({**{names[path]: silent for path in template}, **found}, ids, names)


def check_token_texts(path: Path, spoken: TextResults, folder: Path) -> Iterator[Check]:
    """llama.cpp makes the same text of tokens as the tuned model's tokenizer; a space in front is not counted.

    Nothing where one of the two is missing: that has been said.
    """
    want = spoken.found.get("tuned", {}).get("plain")
    if want is None or not installed("llama.cpp"):
        return
    try:
        result = run("token_texts", {"artifact": str(path), "ids": spoken.ids}, folder)
    except RuntimeFailed as exc:
        yield Check(name="decoding", passed=False, detail=str(exc))
        return
    got = [result(f"text.{number}").tobytes().decode("utf-8", "replace") for number in range(len(want))]
    plain = [text.removeprefix(" ") for text in want], [text.removeprefix(" ") for text in got]
    yield _compare("decoding", *plain, "sequences of tokens")


def _sequences(reference: Reference, sequences: Sequences) -> list[list[int]]:
    """What is decoded: the texts, and every added or trained token by itself."""
    path = reference.tokenizer_file()
    alone = {*(added_tokens(path).values() if path else ()), *sequences.covered}
    return [*sequences.text_ids, *([token] for token in sorted(alone))]


def _has_files(path: Path) -> bool:
    """Whether a folder is more than a model: then a tokenizer that is missing is a fault."""
    return path.is_dir() and ((path / "config.json").is_file() or bool(auxiliary_files(path)))


def _template(path: Path) -> str | None:
    value = GgufModel.open(path).metadata.get("tokenizer.chat_template")
    return value if isinstance(value, str) else None


def _compare(name: str, want: Sequence[Any], got: Sequence[Any], what: str) -> Check:
    wrong = [number for number, (one, other) in enumerate(zip(want, got, strict=False)) if one != other]
    if len(want) != len(got):
        wrong.append(min(len(want), len(got)))
    detail = f"{len(want)} {what}"
    if wrong:
        one, other = (str(side[wrong[0]]) if wrong[0] < len(side) else "nothing" for side in (want, got))
        at = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
        start = max(0, at - 10)
        detail = f"number {wrong[0]}: expected {one[start : start + 40]!r}, found {other[start : start + 40]!r}"
    return Check(name=name, passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
