"""Check that llama.cpp tokenises texts with taught and added tokens, and rendered chats, as transformers does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from exporter.io.files import read_file
from exporter.packages import Requirement
from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.split_files import GgufModel
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check, Skip
from exporter.verify.running.control_texts import CONTROL_TEXTS
from exporter.verify.running.texts import CHATS
from exporter.verify.runtimes.installed import installed
from exporter.verify.runtimes.job import RuntimeFailed, run

_NAME: Final = "tokenised texts"
_TRANSFORMERS: Final = Requirement(("transformers",), "transformers", "ttexport")
#: Results by the digest of everything that determines the result, for the several artifacts of one process.
_results: dict[str, Any] = {}
_MOST_RESULTS: Final = 64


def check_tokenised(path: Path, gguf: GgufModel, reference: Reference) -> Iterator[Check | Skip]:
    """Compare the token ids of control texts, generated texts and rendered chats in a separate process.

    Every taught and every added token occurs in several surroundings. A difference with a known cause that a GGUF
    cannot avoid is reported as skipped, with the cause; any other difference fails the check.
    """
    missing = [] if installed("llama.cpp") else ["llama-cpp-python"]
    missing += [] if _TRANSFORMERS.is_installed() else ["transformers"]
    if missing or not reference.auxiliary_files:
        reason = f"{' and '.join(missing)} not installed" if missing else "the tuned model has no tokenizer"
        yield Skip(_NAME, reason)
        return
    key = _digest(gguf, reference)
    if key not in _results:
        try:
            result = _run(path, reference)
        except RuntimeFailed as exc:
            yield Check(name=_NAME, passed=False, detail=str(exc))
            return
        while len(_results) >= _MOST_RESULTS:
            _results.pop(next(iter(_results)))
        _results[key] = result
    yield from _outcomes(_results[key])


def _run(path: Path, reference: Reference) -> Any:
    with TemporaryDirectory(prefix="ttexport-") as folder:
        staged = Path(folder) / "tuned"
        staged.mkdir()
        for name, file in _files(reference).items():
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).symlink_to(file.resolve())
        job = {
            "artifact": str(path),
            "folder": str(staged),
            "taught": reference.trained_ids,
            "rows": reference.vocab,
            "texts": CONTROL_TEXTS,
            "chats": CHATS,
            "template": reference.templates.get("default"),
        }
        return json.loads(run("tokens.gguf", job, Path(folder) / "job")("result").tobytes())


def _files(reference: Reference) -> dict[str, Path]:
    return {**reference.auxiliary_files, "config.json": reference.checkpoint.path / "config.json"}


def _digest(gguf: GgufModel, reference: Reference) -> str:
    """Return a digest of the GGUF's tokenizer, of the tuned model's tokenizer files and of the taught tokens."""
    digest = hashlib.sha256()
    for key, value in sorted(gguf.metadata.items()):
        if key.startswith(("tokenizer.", "general.name", "general.architecture")):
            content = value.values() if isinstance(value, GgufArray) else value
            digest.update(repr((key, content)).encode("utf-8", "replace"))
    for name, file in sorted(_files(reference).items()):
        digest.update(name.encode() + hashlib.sha256(read_file(file)).digest())
    digest.update(repr((reference.trained_ids, reference.vocab)).encode())
    return digest.hexdigest()


def _outcomes(result: Mapping[str, Any]) -> Iterator[Check | Skip]:
    if "failure" in result:
        yield Skip(_NAME, f"transformers cannot use the tuned model's tokenizer: {result['failure']}")
        return
    differences = result["differences"]
    wrong = [difference for difference in differences if not difference["reason"]]
    total = result["texts"] + result["chats"]
    detail = (
        f"{result['texts']} texts with {result['tokens']} taught and added tokens, and {result['chats']} rendered "
        "chats, have equal token ids in llama.cpp and transformers"
    )
    if wrong:
        detail = _described(wrong[0])
    elif differences:
        detail += f", except for {len(differences)} of the texts, for known reasons"
    yield Check(name=_NAME, passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
    for reason in dict.fromkeys(difference["reason"] for difference in differences if difference["reason"]):
        texts = [difference["text"] for difference in differences if difference["reason"] == reason]
        yield Skip(_NAME, f"{reason}: {len(texts)} of {total} texts differ, such as {texts[0]!r:.80}")


def _described(difference: Mapping[str, Any]) -> str:
    expected, actual = difference["expected"], difference["actual"]
    pairs = enumerate(zip(expected, actual, strict=False))
    at = next((number for number, (want, got) in pairs if want != got), min(len(expected), len(actual)))
    shown = slice(max(0, at - 2), max(0, at - 2) + 8)
    return (
        f"{difference['text']!r:.80}: expected the token ids {expected[shown]} from number {shown.start} on, "
        f"found {actual[shown]}"
    )
