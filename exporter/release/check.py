"""Check every file, tensor and document of a release folder offline against the manifest in the folder.

Every document except the manifest is rendered again and compared byte for byte with the file on disk. If someone edits
only the manifest, the documents rendered from it differ from the files on disk, and the check fails. If someone
rewrites the manifest and all other documents consistently, only the check of the signature fails.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Final

from exporter.errors import NotEquivalent, TTExportError, UnreadableFile
from exporter.io.files import read_file
from exporter.release.documents import card, checksums, modelfile, provenance
from exporter.release.documents import manifest as manifests
from exporter.release.documents import run_record as run_records
from exporter.release.documents.manifest import FileEntry, Manifest
from exporter.release.documents.signature import SIGNATURE, Trust, signature_fault
from exporter.release.documents.tensor_digests import file_digest, file_kind, in_threads, list_files, tensor_digests
from exporter.release.documents.write import NAMES, render_for_models
from exporter.verify.report import Check, Report, Skip, document

_SIGNED: Final = "signature"


def is_release(path: Path) -> bool:
    """Whether ``path`` is a release folder: it contains the manifest or another document that only releases contain."""
    return path.is_dir() and any((path / name).is_file() for name in NAMES)


def check_release(folder: Path, trust: Trust | None = None) -> Report:
    """Check every file, tensor and document of a release.

    trust: the required signer of the release; None skips the check of the signature. Raises UnreadableFile if the
    manifest cannot be read or has an unsupported schema version, BadInput if the public key is unusable, and
    MissingDependency if the package that verifies signatures is not installed.
    """
    manifest, content = manifests.read(folder / manifests.NAME)
    release = _ReleaseFolder(folder, manifest, content)
    checks, skipped = [*release.documents(), *release.files(), release.run()], []
    if trust is not None:
        signed = (folder / SIGNATURE).is_file()
        checks.append(
            _check(_SIGNED, signature_fault(folder, trust) if signed else f"expected {SIGNATURE}, found none")
        )
    else:
        reason = (
            "not checked, because neither --public-key nor --identity was given"
            if (folder / SIGNATURE).is_file()
            else "the release has no signature"
        )
        skipped.append(Skip(_SIGNED, reason))
    unverified = [artifact.path for artifact in manifest.artifacts if artifact.verdict is None]
    skipped += [Skip(f"verdict of {path}", "the artifact was released without verification") for path in unverified]
    if difference := _renderer_difference(manifest):
        skipped.append(Skip("cards and Modelfiles rendered again", difference))
    facts: dict[str, float | str] = {"release": f"{manifest.name} {manifest.version}", "files": len(manifest.files)}
    return Report(artifact=folder, format="release", level="documents", checks=checks, facts=facts, skipped=skipped)


def require_as_released(report: Report) -> None:
    """Raise NotEquivalent if a check failed; the message names the first failed check and counts the others."""
    if not report.passed:
        first, *others = report.failures
        more = f" (and {len(others)} more failed checks)" if others else ""
        line = f"{report.artifact}: the folder does not match its manifest: {first.name}: {first.detail}{more}"
        raise NotEquivalent(line, document([report]))


class _ReleaseFolder:
    """A release on disk, with the parsed manifest and the bytes of the manifest."""

    def __init__(self, folder: Path, manifest: Manifest, content: bytes) -> None:
        self.folder, self.manifest, self.content = folder, manifest, content

    def documents(self) -> Iterator[Check]:
        """Compare the documents with the manifest.

        The bytes of manifest.json must be in canonical form, with sorted keys and two spaces of indentation.
        """
        canonical = manifests.to_bytes(self.manifest)
        paths = [file.path for file in self.manifest.files]
        ordered = paths == sorted(set(paths))
        disorder = None if ordered else "expected the files to be listed in sorted order, each once"
        yield _check(manifests.NAME, _first_difference(canonical, self.content) or disorder)
        statement = provenance.to_bytes(self.manifest)
        yield self._compared(provenance.NAME, statement)
        # The checksums are computed from the manifest's bytes on disk: if the bytes are not canonical, the checksums
        # differ.
        sums = checksums.to_bytes(self.manifest, {manifests.NAME: self.content, provenance.NAME: statement})
        yield self._compared(checksums.NAME, sums)
        if not _renderer_difference(self.manifest):
            yield _check("cards and Modelfiles", self._card_fault())

    def files(self) -> Iterator[Check]:
        """Compare the files in the folder with the files that the manifest lists."""
        listed = {file.path: file for file in self.manifest.files}
        present = set(list_files(self.folder)) - {*NAMES, SIGNATURE}
        missing, extra = sorted(listed.keys() - present), sorted(present - listed.keys())
        faults = [f"{path}: listed in the manifest, but missing from the folder" for path in missing] + [
            f"{path!r}: present in the folder, but not listed in the manifest" for path in extra
        ]
        yield _check("files", _first_of(faults))
        files = [listed[path] for path in sorted(listed.keys() & present)]
        reasons = in_threads(self._content_fault, files)
        yield _check("digests", _first_of(filter(None, reasons)))
        # The tensors of a file are not compared if the digest of the file differs: that check has already failed.
        intact = [file for file, reason in zip(files, reasons, strict=True) if reason is None]
        yield _check("tensors", _first_of(filter(None, in_threads(self._tensor_fault, intact))))
        yield _check("artifacts", self._artifact_fault(listed))

    def run(self) -> Check:
        """Check that the digests in run.json match the manifest, the signature and the content of run.json."""
        try:
            record, content = run_records.read(self.folder / run_records.NAME)
        except UnreadableFile as exc:
            return _check(run_records.NAME, exc.reason)
        signature = self.folder / SIGNATURE
        digest = file_digest(signature)[1] if signature.is_file() else None
        if record.sha256 != run_records.own_digest(record) or manifests.to_bytes(record) != content:
            return _check(run_records.NAME, "the content of the file does not match the digest recorded in the file")
        if record.manifest_sha256 != hashlib.sha256(self.content).hexdigest():
            return _check(run_records.NAME, f"the digest recorded in the file does not match {manifests.NAME}")
        if record.signature_sha256 != digest:
            expected = "no signature" if record.signature_sha256 is None else f"sha256 {record.signature_sha256}"
            return _check(run_records.NAME, f"{SIGNATURE}: expected {expected}, found {digest or 'none'}")
        return _check(run_records.NAME, None)

    def _compared(self, name: str, expected: bytes) -> Check:
        try:
            content = read_file(self.folder / name, max_nbytes=max(len(expected) + 1, 1 << 20))
        except UnreadableFile as exc:
            return _check(name, exc.reason)
        return _check(name, _first_difference(expected, content))

    def _card_fault(self) -> str | None:
        """Render the cards and Modelfiles again from the manifest, and compare the result with the files on disk."""
        try:
            rendered = render_for_models(self.folder, self.manifest)
        except TTExportError as exc:  # for example, a GGUF cannot be opened; the digests report this GGUF as well
            return str(exc)
        names = {card.NAME, modelfile.NAME}
        listed = {file.path for file in self.manifest.files if Path(file.path).name in names}
        for path, content in sorted(rendered.items()):
            check = self._compared(path, content)
            if not check.passed:
                return f"{path}: {check.detail}"
        return (
            None
            if rendered.keys() <= listed
            else f"{min(rendered.keys() - listed)}: the manifest does not list this file"
        )

    def _content_fault(self, file: FileEntry) -> str | None:
        try:
            size, digest = file_digest(self.folder / file.path)
        except UnreadableFile as exc:
            return f"{file.path}: {exc.reason}"
        if size != file.size:
            return f"{file.path}: expected {file.size} bytes, found {size}"
        return None if digest == file.sha256 else f"{file.path}: expected sha256 {file.sha256}, found {digest}"

    def _tensor_fault(self, file: FileEntry) -> str | None:
        """Compare the kind and the tensors of a file with the entry for the file in the manifest."""
        if (actual := file_kind(file.path)) != file.kind:
            return f"{file.path}: expected kind {file.kind}, found {actual}"
        try:
            tensors = tensor_digests(self.folder / file.path)
        except UnreadableFile as exc:
            return f"{file.path}: {exc.reason}"
        return None if tensors == file.tensors else f"{file.path}: {_first_tensor(file.tensors, tensors)}"

    def _artifact_fault(self, listed: Mapping[str, FileEntry]) -> str | None:
        for artifact in self.manifest.artifacts:
            if not any(path == artifact.path or path.startswith(f"{artifact.path}/") for path in listed):
                return f"{artifact.path}: the manifest lists no file of this artifact (job {artifact.job})"
            if artifact.verdict is not None and not artifact.verdict.passed:
                return f"{artifact.path}: the verification of this artifact failed"
        return None


def _renderer_difference(manifest: Manifest) -> str | None:
    """Return a text that names the first template package whose installed version did not render the cards, or None.

    With another version of a template package such as Jinja2, the same manifest may be rendered to different bytes. If
    the versions differ, the check of the release does not render the cards again. An edited card is still detected,
    because the manifest contains the digest of every card.
    """
    for name, version in card.renderers().items():
        if (used := manifest.tools.get(name)) != version:
            return f"the documents were rendered with {name} {used or 'unknown'}, but version {version} is installed"
    return None


def _first_tensor(expected: Mapping[str, str], actual: Mapping[str, str]) -> str:
    name = min(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    return f"{name}: expected sha256 {expected.get(name)}, found {actual.get(name)}"


def _first_difference(expected: bytes, actual: bytes) -> str | None:
    """Return the first line that differs between two documents, with the line number counted from 1.

    Return None if the two documents have equal bytes.
    """
    if expected == actual:
        return None
    expected_lines, actual_lines = expected.splitlines(keepends=True), actual.splitlines(keepends=True)
    for number, (line, other) in enumerate(zip_longest(expected_lines, actual_lines, fillvalue=b""), 1):
        if line != other:
            return f"line {number}: expected {line!r:.100}, found {other!r:.100}"
    raise AssertionError("the bytes of the two documents differ, but no line differs")


def _check(name: str, reason: str | None) -> Check:
    return Check(name=name, passed=reason is None, detail=reason or "")


def _first_of(faults: Iterable[str]) -> str | None:
    first, *others = [*faults] or [""]
    return first + (f" (and {len(others)} more)" if others else "") or None
