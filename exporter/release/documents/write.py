"""Write the documents of a release. Every document except run.json is covered by a digest in another document.

The manifest lists cards, Modelfiles and artifacts. The provenance statement lists the manifest as a subject. SHA256SUMS
lists the files of the release, the manifest and the provenance statement. The file run.json contains the digests of the
manifest and of the signature. The signature covers all files except run.json and the signature itself. If someone
rewrites all documents consistently, only the check of the signature fails.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from exporter.errors import OutputError
from exporter.io.staging import write_file
from exporter.release.documents import card, checksums, modelfile, provenance, run_record
from exporter.release.documents import manifest as manifests
from exporter.release.documents.manifest import Manifest
from exporter.release.documents.signature import Signing, sign
from exporter.release.documents.tensor_digests import entries, entry, list_files
from exporter.release.facts import Release, Run

#: Documents at the top of a release. The cards and Modelfiles of the models are not in this list.
NAMES = (manifests.NAME, checksums.NAME, provenance.NAME, run_record.NAME)


def write_documents(draft: Path, release: Release, run: Run, *, signing: Signing | None = None) -> None:
    """Write the manifest and every other document of ``release`` into the folder ``draft``.

    The folder ``draft`` must contain the artifacts and no other file.

    Every document is fsynced, and no existing file is overwritten. Two calls for the same release write the same bytes,
    except for run.json and the signature. Every artifact is read twice for hashing: once for the digest of the file and
    once for the digests of the tensors. Raises OutputError if a document already exists and BadInput if the manifest
    cannot represent a file name.
    """
    release = replace(release, tools={**release.tools, **card.renderers()})
    files = entries(draft, list_files(draft))
    manifest = manifests.build(release, files)
    _require_artifacts(draft, manifest)
    for path, content in render_for_models(draft, manifest).items():
        write_file(draft / path, content)
        files.append(entry(draft, path))
    manifest = manifests.build(release, files)
    manifest_bytes, provenance_bytes = manifests.to_bytes(manifest), provenance.to_bytes(manifest)
    write_file(draft / manifests.NAME, manifest_bytes)
    write_file(draft / provenance.NAME, provenance_bytes)
    sums = checksums.to_bytes(manifest, {manifests.NAME: manifest_bytes, provenance.NAME: provenance_bytes})
    write_file(draft / checksums.NAME, sums)
    signature = sign(draft, signing) if signing else None
    write_file(draft / run_record.NAME, run_record.to_bytes(run, manifest_bytes, signature))


def render_for_models(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Map the relative path of each card and Modelfile to its rendered content. folder: the release folder."""
    pages = {}
    for key, model in manifest.models.items():
        place = Path(model.folder)
        pages[(place / card.NAME).as_posix()] = card.to_bytes(manifest, key)
        modelfile_bytes = modelfile.to_bytes(folder, manifest, key)
        if modelfile_bytes is not None:
            pages[(place / modelfile.NAME).as_posix()] = modelfile_bytes
    if card.NAME not in pages:
        pages[card.NAME] = card.index_to_bytes(manifest)
    return pages


def _require_artifacts(draft: Path, manifest: Manifest) -> None:
    """Raise OutputError if an artifact of the manifest does not exist."""
    for artifact in manifest.artifacts:
        if not (draft / artifact.path).exists():
            raise OutputError(draft / artifact.path, f"the artifact of job {artifact.job} does not exist")
