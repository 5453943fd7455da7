"""Whether a folder is the release that its manifest tells of: every file, every tensor, every document, offline.

The manifest is believed only where the other documents agree with it: they are made from it again and compared byte
by byte. All of them rewritten in agreement are a release of somebody else: whose it is, a signature says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from exporter.errors import NotEquivalent, TTExportError, UnreadableFile
from exporter.io.files import read_file
from exporter.release.documents import card, checksums, manifest, provenance
from exporter.release.documents import run_record as record
from exporter.release.documents.manifest import FileEntry, Manifest
from exporter.release.documents.signature import SIGNATURE, Trust, why_not_signed
from exporter.release.documents.tensor_digests import file_digest, in_threads, kind_of, list_files, tensor_digests
from exporter.release.documents.write import NAMES, derived
from exporter.verify.report import Check, Report, Skip, document

_SIGNED: Final = "signature"


def is_release(path: Path) -> bool:
    """Whether ``path`` is a folder with one of the documents that only a release has."""
    return path.is_dir() and any((path / name).is_file() for name in NAMES)


def check_release(folder: Path, trust: Trust | None = None) -> Report:
    """Check all of a release again. trust: whose signature it has to bear; None: none is asked for.

    Raises UnreadableFile for a manifest that cannot be read or is of another version, BadInput for a key that cannot
    be used, MissingDependency for a signature without the package that reads it.
    """
    built, content = manifest.read(folder / manifest.NAME)
    found = _Folder(folder, built, content)
    checks, skipped = [*found.documents(), *found.files(), found.run()], []
    if trust is not None:
        reason = (
            why_not_signed(folder, trust) if (folder / SIGNATURE).is_file() else f"expected {SIGNATURE}, found none"
        )
        checks.append(Check(name=_SIGNED, passed=reason is None, detail=reason or ""))
    else:
        why = "no key was given" if (folder / SIGNATURE).is_file() else "the release bears none"
        skipped.append(Skip(_SIGNED, why))
    unproved = [one.path for one in built.artifacts if one.verdict is None]
    skipped += [Skip(f"verdict of {path}", "it was released without a verification") for path in unproved]
    if made_by := _made_otherwise(built):
        skipped.append(Skip("cards and Modelfiles made again", made_by))
    facts: dict[str, float | str] = {"release": f"{built.name} {built.version}", "files": len(built.files)}
    return Report(artifact=folder, format="release", level="documents", checks=checks, facts=facts, skipped=skipped)


def require_as_released(report: Report) -> None:
    """Raise NotEquivalent with the first difference, and how many more checks found one."""
    if not report.passed:
        first, *others = report.failures
        more = f" (and {len(others)} more)" if others else ""
        line = f"{report.artifact}: not what was released: {first.name}: {first.detail}{more}"
        raise NotEquivalent(line, document([report]))


class _Folder:
    """A release on disk, its manifest as it was understood, and that one's bytes."""

    def __init__(self, folder: Path, built: Manifest, content: bytes) -> None:
        self.folder, self.built, self.content = folder, built, content

    def documents(self) -> Iterator[Check]:
        """The documents against the manifest, and the manifest against its one spelling."""
        again = manifest.to_bytes(self.built)
        paths = [one.path for one in self.built.files]
        ordered = paths == sorted(set(paths))
        disorder = None if ordered else "expected each file once, in order"
        yield _check(manifest.NAME, _first_difference(again, self.content) or disorder)
        statement = provenance.to_bytes(self.built)
        yield self._same(provenance.NAME, statement)
        # Of what lies there: a document that differs from the manifest must not agree with the checksums either.
        sums = checksums.to_bytes(self.built, {manifest.NAME: self.content, provenance.NAME: statement})
        yield self._same(checksums.NAME, sums)
        if not _made_otherwise(self.built):
            yield _check("cards and Modelfiles", self._cards())

    def files(self) -> Iterator[Check]:
        """What lies in the folder against what the manifest lists."""
        listed = {one.path: one for one in self.built.files}
        there = set(list_files(self.folder)) - {*NAMES, SIGNATURE}
        missing, extra = sorted(listed.keys() - there), sorted(there - listed.keys())
        found = [f"{path}: expected, not found" for path in missing] + [f"{path!r}: not released" for path in extra]
        yield _check("files", _first_of(found))
        held = [listed[path] for path in sorted(listed.keys() & there)]
        reasons = in_threads(self._content, held)
        yield _check("digests", _first_of(filter(None, reasons)))
        # A file of other bytes has other tensors, or none: one finding is enough.
        whole = [one for one, reason in zip(held, reasons, strict=True) if reason is None]
        yield _check("tensors", _first_of(filter(None, in_threads(self._tensors, whole))))
        yield _check("artifacts", self._artifacts(listed))

    def run(self) -> Check:
        """run.json against itself, the manifest and the signature."""
        try:
            told, content = record.read(self.folder / record.NAME)
        except UnreadableFile as exc:
            return _check(record.NAME, exc.reason)
        signature = self.folder / SIGNATURE
        digest = file_digest(signature)[1] if signature.is_file() else None
        if told.sha256 != record.own_digest(told) or manifest.to_bytes(told) != content:
            return _check(record.NAME, "its content is not what its digest was taken of")
        if told.manifest_sha256 != hashlib.sha256(self.content).hexdigest():
            return _check(record.NAME, f"it records a run that made another {manifest.NAME}")
        if told.signature_sha256 != digest:
            expected = "no signature" if told.signature_sha256 is None else f"sha256 {told.signature_sha256}"
            return _check(record.NAME, f"{SIGNATURE}: expected {expected}, found {digest or 'none'}")
        return _check(record.NAME, None)

    def _same(self, name: str, expected: bytes) -> Check:
        try:
            found = read_file(self.folder / name, max_nbytes=max(len(expected) + 1, 1 << 20))
        except UnreadableFile as exc:
            return _check(name, exc.reason)
        return _check(name, _first_difference(expected, found))

    def _cards(self) -> str | None:
        """The cards and Modelfiles, made of the manifest again."""
        try:
            again = derived(self.folder, self.built)
        except TTExportError as exc:  # a GGUF that cannot be opened has its own line among the digests
            return str(exc)
        kinds = {card.NAME, "Modelfile"}
        listed = {one.path for one in self.built.files if Path(one.path).name in kinds}
        for path, content in sorted(again.items()):
            check = self._same(path, content)
            if not check.passed:
                return f"{path}: {check.detail}"
        return None if again.keys() <= listed else f"{min(again.keys() - listed)}: not in the manifest"

    def _content(self, one: FileEntry) -> str | None:
        try:
            size, digest = file_digest(self.folder / one.path)
        except UnreadableFile as exc:
            return f"{one.path}: {exc.reason}"
        if size != one.size:
            return f"{one.path}: expected {one.size} bytes, found {size}"
        return None if digest == one.sha256 else f"{one.path}: expected sha256 {one.sha256}, found {digest}"

    def _tensors(self, one: FileEntry) -> str | None:
        """What else the manifest says of a file whose bytes are right."""
        if (kind := kind_of(one.path)) != one.kind:
            return f"{one.path}: expected kind {one.kind}, found {kind}"
        try:
            tensors = tensor_digests(self.folder / one.path)
        except UnreadableFile as exc:
            return f"{one.path}: {exc.reason}"
        return None if tensors == one.tensors else f"{one.path}: {_first_tensor(one.tensors, tensors)}"

    def _artifacts(self, listed: Mapping[str, FileEntry]) -> str | None:
        for one in self.built.artifacts:
            if not any(path == one.path or path.startswith(f"{one.path}/") for path in listed):
                return f"{one.path}: expected files of job {one.job}, found none"
            if one.verdict is not None and not one.verdict.passed:
                return f"{one.path}: its verification failed"
        return None


def _made_otherwise(built: Manifest) -> str | None:
    """Which package that writes cards was another one then; their bytes are covered by digests all the same."""
    for name, version in card.makers().items():
        if built.tools.get(name) != version:
            return f"they were made by {name} {built.tools.get(name, 'unknown')}, this is {version}"
    return None


def _first_tensor(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"{name}: expected sha256 {expected.get(name)}, found {found.get(name)}"


def _first_difference(expected: bytes, found: bytes) -> str | None:
    """The first line that differs, counted from 1; None for equal bytes."""
    if expected == found:
        return None
    ours, theirs = expected.splitlines(keepends=True), found.splitlines(keepends=True)
    number = next(
        (at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    want, got = (lines[number] if number < len(lines) else b"" for lines in (ours, theirs))
    return f"line {number + 1}: expected {want!r:.100}, found {got!r:.100}"


def _check(name: str, reason: str | None) -> Check:
    return Check(name=name, passed=reason is None, detail=reason or "")


def _first_of(found: Iterable[str]) -> str | None:
    first, *others = [*found] or [""]
    return first + (f" (and {len(others)} more)" if others else "") or None
